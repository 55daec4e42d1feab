"""Everything that the documentation names exists: links, commands, options, keys, files. Docstrings are complete.

Every command line is split as in a shell, and given to the parser of the command itself. So if an option is renamed and
a page still has the old name, a test fails here. Other tests check what the commands do.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
import pytest
import torch
import typer.main
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

import entropy_fork
from entropy_fork.cli import app
from entropy_fork.core.rule import KEY_OF
from entropy_fork.core.scores import FIELDS, SCORES
from entropy_fork.core.tally import METRICS, Tally, draws
from entropy_fork.core.where import check_where

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md", "changes/*.md", ".github/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
SECTIONS = [
    "Use it", "The path of a number", "Run the demo", "Your own runs", "Reproduce the paper", "Choose your semantics",
    "Performance", "Limits", "The package", "Citation",
]  # fmt: skip

FENCE = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
#: placeholders that a reader replaces
PLACEHOLDER = re.compile(r"…|<[a-z ]+>")

OWN = [
    file.relative_to(REPOSITORY).as_posix()
    for folder in ("entropy_fork", "hydra_plugins", "recipes", "docs", "tests", "examples", "benchmarks", "changes")
    for file in (REPOSITORY / folder).rglob("*")
    if file.is_file() and "__pycache__" not in file.parts
]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


@cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """The texts between backticks."""
    return [" ".join(span.split()) for span in SPAN.findall(prose(page))]


def command_lines(page: Path) -> list[str]:
    """The command lines in a page's shell blocks. Continued lines are joined, and comments removed."""
    lines = []
    for _, language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "sh":
            lines += re.sub(r"\\\n\s*", "", block).splitlines()
    return [re.sub(r"\$\(.*?\)", "…", re.sub(r"(^|\s)#.*", "", line)).strip() for line in lines]


def code(page: Path) -> list[str]:
    return command_lines(page) + spans(page)


def after(program: str, page: Path) -> Iterator[str]:
    """The arguments of each call of a program, up to the end of the command."""
    for line in code(page):
        for found in re.finditer(rf"(?:^|[\s;|(]|\.venv/bin/){program}\s+([^;|]*)", line):
            yield found[1]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from a page's headings."""
    found: set[str] = set()
    for heading in HEADING.findall(prose(page)):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def test_the_readme_goes_from_what_it_is_to_how_to_cite_it() -> None:
    readme = REPOSITORY / "README.md"
    assert re.findall(r"^## (.+)$", prose(readme), re.MULTILINE) == SECTIONS
    opening = prose(readme).split("\n## ")[0]
    assert "](docs/pictures/forking_tokens.svg)" in opening, "no picture before the first section"
    first = prose(readme).split("\n\n")[1]
    assert len(re.findall(r"[.!?](?= [A-Z]|$)", " ".join(first.split()))) == 2, "what it is, in two sentences"
    assert "**Status**" in opening, "no line that says on what it was tested"


def test_the_tree_of_the_readme_has_every_folder_of_the_package() -> None:
    tree = re.search(r"^entropy_fork/\n((?:  .*\n)+)", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert tree is not None
    named, parent = set(), ""
    for indent, folder in re.findall(r"^( +)(\w+)/", tree[1], re.MULTILINE):
        parent = folder if len(indent) == 2 else parent
        named.add(folder if len(indent) == 2 else f"{parent}/{folder}")
    package = REPOSITORY / "entropy_fork"
    there = {file.parent.relative_to(package).as_posix() for file in package.glob("*/**/__init__.py")}
    assert there <= named
    assert [name for name in named - there if not (package / f"{name}.py").is_file()] == []


def test_a_page_that_the_code_names_is_there() -> None:
    named = [
        (file, page)
        for pattern in ("*.toml", "Makefile", ".ci/*", "{}/**/*.py", "{}/**/*.yaml")
        for folder in ("entropy_fork", "hydra_plugins", "recipes", "examples", "benchmarks", "tests", "docs")
        for file in sorted(REPOSITORY.glob(pattern.format(folder)))
        for page in re.findall(r"\bdocs/[\w/]+\.(?:md|svg|png|py)\b", file.read_text(encoding="utf-8"))
    ]
    assert len(named) > 20, "nothing was read"
    assert [(str(file), page) for file, page in named if not (REPOSITORY / page).is_file()] == []


def test_every_table_that_is_made_from_the_code_stands_on_one_page() -> None:
    asked = [name for page in PAGES for name in re.findall(r"<!-- table: ([\w-]+) -->", page.read_text())]
    assert sorted(asked) == sorted(tables().TABLES)
    # and the line for readers of the plain Markdown is gone where the table stands
    assert [page for page in PAGES if "*The site has" in tables().fill(page.read_text())] == []


@pytest.mark.parametrize(
    "name",
    ["keys", "guards", "presets", "recipes", "clusters", "commands", "metrics", "scores", "score-costs", "fields"],
)
def test_a_table_has_what_the_code_has(name: str) -> None:
    made = tables().TABLES[name]()
    folder = {"presets": "entropy_fork", "recipes": "recipe", "clusters": "cluster"}.get(name)
    expected: set[str]
    if folder is not None:
        expected = {file.stem for file in (REPOSITORY / "recipes" / folder).glob("*.yaml")}
    elif name == "commands":
        expected = set(called_by_name(typer.main.get_command(app), "entropy-fork"))
    elif name == "metrics":
        expected = {f"entropy_fork/{metric}" for metric in METRICS}
    elif name in ("scores", "score-costs", "fields"):
        expected = set(FIELDS if name == "fields" else SCORES)
    else:
        expected = keys({"keys": "EntropyForkConfig", "guards": "GuardsConfig"}[name])
    found = set(re.findall(r"^(?:### |\| )`([^`]+)`", made, re.MULTILINE))
    assert expected <= found
    assert name == "commands" or found == expected


def called_by_name(command: Any, name: str) -> Iterator[str]:
    for child, below in getattr(command, "commands", {}).items():
        yield from called_by_name(below, f"{name} {child}")
    if not hasattr(command, "commands"):
        yield name


@cache
def tables() -> Any:
    """The module docs/tables.py, which belongs to no package."""
    place = importlib.util.spec_from_file_location("tables", REPOSITORY / "docs/tables.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    sys.modules["tables"] = module  # dataclasses look up their module
    place.loader.exec_module(module)
    return module


def test_the_metrics_that_are_logged_are_those_that_are_listed() -> None:
    full = Tally(**{field.name: 1.0 for field in fields(Tally)} | {"num_tokens": 2.0})
    seeds, lengths = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    computed = full.metrics().keys() | draws(seeds, torch.ones(2, dtype=torch.bool), lengths).keys()
    # what is written elsewhere under our name, but for the sums that never reach a log
    sources = [file.read_text() for file in (REPOSITORY / "entropy_fork/verl").rglob("*.py")]
    written = {
        name
        for source in sources
        for name in re.findall(r"f\"\{NODE\}/(\w+)\"", source)
        if not name.startswith("loss_")
    }
    observed = {f"{name}_SCORE" for source in sources for name in re.findall(r"f\"(\w+_with)_\{name\}\"", source)}
    assert computed | written | observed == set(METRICS)


def test_the_page_of_scores_says_what_every_score_and_field_needs() -> None:
    made, costs = (tables().TABLES[name]() for name in ("scores", "score-costs"))
    for name, score in SCORES.items():
        (row, cost) = [
            line for table in (made, costs) for line in table.splitlines() if line.startswith(f"| `{name}` |")
        ]
        assert score.formula.replace("|", r"\|") in row
        assert score.source.replace("|", r"\|") in row
        assert all(f"`{field}`" in cost for field in score.fields)
    refused = {name for name in SCORES if re.search(rf"^\| `{name}` .*\| refused \|$", costs, re.MULTILINE)}
    assert refused == {"gradient_norm", "position", "random"}
    for field in ("ref_log_prob", "rollout_log_prob", "sum_pi_squared"):
        assert re.search(rf"^\| `{field}` .*Write `actor_rollout_ref\.", tables().TABLES["fields"](), re.MULTILINE)


def test_the_page_of_scores_has_every_map_use_and_preset() -> None:
    page = REPOSITORY / "docs/reference/scores.md"
    for key in ("map", "use", "control", "outside"):
        for value in KEY_OF[key].values:
            assert value == "none" or re.search(rf"`(\w+=)?{value}`", prose(page)), f"{key}={value}"
    literature = {
        file.stem
        for file in (REPOSITORY / "recipes/entropy_fork").glob("*.yaml")
        if "arXiv" in file.read_text().partition(":")[0]
    }
    assert len(literature) > 8
    assert literature <= set(spans(page))


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@every_page
def test_every_target_of_make_and_its_variables_exist(page: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    for called in after("make", page):
        words = shlex.split(called)
        assert words[0] in targets, f"make {called}"
        assert {word.partition("=")[0] for word in words[1:] if "=" in word} <= variables, f"make {called}"


@every_page
def test_every_command_line_of_ours_is_one_that_the_command_takes(page: Path) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group | typer.core.TyperGroup)
    for called in after("entropy-fork", page):
        command: click.Command = group
        words = shlex.split(called)
        while isinstance(command, click.Group | typer.core.TyperGroup) and words and not words[0].startswith("-"):
            assert words[0] in command.commands, f"entropy-fork {called}: no such command"
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        named = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
        assert named <= options | {"--help"}, f"entropy-fork {called}"
        if command is group:
            continue  # its options act as soon as they are read: --install-completion would write into the home
        if called in spans_after(page) or PLACEHOLDER.search(called):
            continue
        with pytest.MonkeyPatch.context() as patch:  # options with a path: in a text it is only a name
            patch.setattr(click.Path, "convert", lambda self, value, *_: value)
            try:
                command.make_context("entropy-fork", words)
            except click.exceptions.Exit:
                pass  # --help, --version
            except click.UsageError as error:
                pytest.fail(f"entropy-fork {called}: {error.format_message()}")


def spans_after(page: Path) -> set[str]:
    """Calls of our programs in running text, often without arguments."""
    return {span.removeprefix("entropy-fork ") for span in spans(page)}


@cache
def keys(schema: str) -> set[str]:
    """The keys of a config node, read from the source, because an import would import all of verl."""
    for node in ast.parse((REPOSITORY / "entropy_fork/verl/config/schema.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == schema:
            return {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
    raise AssertionError(f"{schema} is not in verl/config/schema.py")


@every_page
def test_every_key_preset_recipe_and_cluster_exists(page: Path) -> None:
    text = "\n".join(code(page))
    for key, is_set in re.findall(r"(?<![\w/.:])\+{0,2}entropy_fork\.([a-z]\w*)(=?)", text):
        is_module = any((REPOSITORY / "entropy_fork" / name).exists() for name in (key, f"{key}.py"))
        assert key in keys("EntropyForkConfig") or (is_module and not is_set), f"entropy_fork.{key}"
    for key in re.findall(r"entropy_fork_guards\.([a-z]\w*)", text):
        assert key in keys("GuardsConfig"), f"entropy_fork_guards.{key}"
    groups = "recipe|cluster|template|entropy_fork|entropy_fork_guards"
    for group, names in re.findall(rf"(?<![\w.])\+?({groups})=([\w,]+)", text):
        for name in names.split(","):
            file = REPOSITORY / "recipes" / group / f"{name}.yaml"
            assert file.is_file() or name in ("NAME", "KEY"), f"{group}={name}"


CONDITIONS = re.compile(r"^entropy_fork\.where=.*", re.DOTALL)


def test_a_condition_on_a_page_reaches_the_run_through_shell_and_hydra() -> None:
    """A shell removes one pair of quotes, Hydra the other; what is left is a condition that can be read."""
    words = [
        word
        for page in PAGES
        for line in [*command_lines(page), *spans(page)]
        if "entropy_fork.where=" in line
        for word in shlex.split(re.sub(r"<[a-z ]+>", "", line))
        if CONDITIONS.match(word)
    ]
    assert len(words) > 3
    for word in words:
        override = OverridesParser.create().parse_override(word)
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
        for value in values:
            check_where(value.strip("\"'"))


def test_the_conditions_that_the_page_of_scores_shows_can_be_read() -> None:
    text = (REPOSITORY / "docs/reference/scores.md").read_text()
    (shown,) = [block for _, language, block in FENCE.findall(text) if language == "text"]
    for condition in shown.splitlines():
        check_where(condition)


@every_page
def test_python_on_a_page_is_python_and_imports_what_is_there(page: Path) -> None:
    for _, language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)) if language == "python" else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("entropy_fork"):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    is_module = hasattr(module, "__path__") and find_spec(f"{node.module}.{name.name}")
                    assert is_module or hasattr(module, name.name), f"{node.module} has no {name.name}"


def with_imported_examples(script: str) -> str:
    """The text of a script, and of the examples that it imports: they may declare its options."""
    texts = [(REPOSITORY / script).read_text()]
    for package, name in re.findall(r"^from (examples[\w.]*) import (\w+)", texts[0], re.MULTILINE):
        files = [REPOSITORY / f"{place.replace('.', '/')}.py" for place in (package, f"{package}.{name}")]
        texts += [file.read_text() for file in files if file.is_file()]
    return "\n".join(texts)


@every_page
def test_every_file_and_every_option_of_a_script_exists(page: Path) -> None:
    rooms = "benchmarks|examples|tests|docs|recipes|entropy_fork|hydra_plugins"
    for line in code(page):
        for place in re.findall(rf"(?<![\w/.-])(?:{rooms})/[\w./-]+\.\w+", line):
            assert (REPOSITORY / place).is_file(), f"{place} in: {line}"
        scripts = re.findall(r"python3? ((?:benchmarks|examples)/[\w/]+\.py)([^;|]*)", line)
        for module, arguments in re.findall(r"python3? -m ((?:examples|benchmarks)\.[\w.]+)([^;|]*)", line):
            place = module.replace(".", "/")
            is_package = (REPOSITORY / place).is_dir()
            scripts.append((f"{place}/__main__.py" if is_package else f"{place}.py", arguments))
        for script, arguments in scripts:
            source = with_imported_examples(script)
            for option in re.findall(r"\s--([a-z][\w-]*)", arguments):
                declared = rf"\"--{option}\"|\b{option.replace('-', '_')}: "
                assert re.search(declared, source), f"--{option} in: {line}"


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == entropy_fork.__version__
    assert "## [Unreleased]" in (REPOSITORY / "CHANGELOG.md").read_text()


PUBLIC_MODULES = [
    path
    for folder in ("entropy_fork", "hydra_plugins")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
    if path.parent.name != "cli"  # --help shows their docstrings
]


def public_functions(node: ast.Module | ast.ClassDef, of_class: str = "") -> Iterator[tuple[ast.FunctionDef, str]]:
    """Each public function with its docstring. __init__ and __post_init__ use the docstring of their class."""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child, ast.get_docstring(child) or "")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if child.name in ("__init__", "__post_init__"):
                yield child, of_class
            elif not child.name.startswith("_"):
                yield child, ast.get_docstring(child) or ""


@pytest.mark.parametrize("module", PUBLIC_MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_docstrings_say_what_shape_tensors_have_and_what_is_raised(module: Path) -> None:
    for function, docstring in public_functions(ast.parse(module.read_text())):
        given = [argument.annotation for argument in (*function.args.args, *function.args.kwonlyargs)]
        types = " ".join(ast.unparse(kind) for kind in (*given, function.returns) if kind is not None)
        if re.search(r"\b(Tensor|ndarray|NDArray)\b", types):
            # or whose they are
            assert re.search(r"\bshapes?\b|:func:", docstring), f"{function.name}: no word on shapes"
        for statement in ast.walk(function):
            if isinstance(statement, ast.Raise) and isinstance(statement.exc, ast.Call):
                error = ast.unparse(statement.exc.func).replace("all_at_once", "EntropyForkError")
                assert error in docstring or error.startswith("_"), f"{function.name}: raises {error}, and does not say"


@pytest.fixture(scope="module")
def hook() -> Any:
    """docs/site.py, which 'make docs' runs."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_site", REPOSITORY / "docs" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(REPOSITORY / "docs"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_long_lines_of_text_wrap_on_the_site_and_drawings_do_not(hook: Any) -> None:
    plain, bare, drawn, python = "```text\na  b\n```", "  ```\n  a\n  ```", "```text\n┏━┓\n```", "```python\n1\n```"
    page = "\n\n".join([plain, "prose", bare, drawn, python, plain])
    expected = [
        plain.replace("text", "output"), "prose", bare.replace("```", "```output", 1), drawn, python,
        plain.replace("text", "output"),
    ]  # fmt: skip
    assert hook.BLOCK.sub(hook.wrapped, page) == "\n\n".join(expected)


def test_a_table_of_a_docstring_becomes_one_of_the_site(hook: Any) -> None:
    text = (
        "Above.\n\n=====  =====\nfile   does\n=====  =====\n``a``  1 | 2\nb      x,\n       y\n=====  =====\n\nBelow."
    )
    assert hook.SIMPLE_TABLE.sub(hook.markdown_table, text) == (
        "Above.\n\n| file | does |\n| --- | --- |\n| `a` | 1 \\| 2 |\n| b | x, y |\n\nBelow."
    )


def test_no_table_of_the_reference_is_a_header_alone(hook: Any) -> None:
    for name, make in hook.tables.TABLES.items():
        lines = [*make().splitlines(), ""]
        heads = [place for place, line in enumerate(lines) if re.fullmatch(r"\|( --- \|)+", line)]
        for place in heads:
            assert lines[place + 1].startswith("| "), f"{name}: {lines[place - 1]}"
            assert re.search(r"\w", lines[place - 1]), f"{name}: a blank header"


@pytest.mark.process
def test_make_docs_says_where_it_wrote() -> None:
    command = ["make", "--dry-run", "--no-print-directory", "docs"]  # a make may run these tests
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    folder = yaml.safe_load(re.sub(r"!!python\S*", "", (REPOSITORY / "mkdocs.yml").read_text()))["site_dir"]
    assert said[-1].startswith(f'echo "written: {folder}/index.html')


@pytest.mark.process
def test_the_site_is_searched_where_it_is_opened_from_a_disk(tmp_path: Path) -> None:
    """Without a server and without a request to one: a small site with the settings of mkdocs.yml."""
    from helpers.browser import Heard, browser
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(REPOSITORY / "mkdocs.yml"))
    (tmp_path / "docs" / "below").mkdir(parents=True)
    for name, text in (("index", "# First\n\nNothing."), ("below/other", "# Forks\n\nAn unusual sentence.")):
        (tmp_path / "docs" / f"{name}.md").write_text(text)
    for name in ("iframe-worker.js", "site.css"):
        (tmp_path / "docs" / name).write_bytes((REPOSITORY / "docs" / name).read_bytes())
    mine = {
        "site_name": "small",
        "theme": {"name": "material", "font": False},
        "use_directory_urls": config["use_directory_urls"],
        "extra": {"polyfills": config["extra"]["polyfills"]},
        "plugins": [plugin for plugin in config.user_configs[0]["plugins"] if isinstance(plugin, str)],
    }
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(mine))
    build(load_config(str(tmp_path / "mkdocs.yml")))
    with browser() as opened:
        for name in ("index", "below/other"):
            page = opened.new_page()
            heard = Heard()
            heard.listen(page)
            page.goto((tmp_path / "site" / f"{name}.html").as_uri())
            page.locator("input.md-search__input").click()
            page.keyboard.type("unusual")
            page.wait_for_selector("a.md-search-result__link", timeout=20_000)
            link = page.locator("a.md-search-result__link").first.get_attribute("href")
            assert link.split("?")[0] == (tmp_path / "site" / "below" / "other.html").as_uri()
            assert [url for url in heard.requests if not url.startswith(("file:", "data:", "blob:"))] == []
            assert heard.console == []


@pytest.mark.process
def test_what_documented_commands_write_into_a_clone_is_ignored_by_git(tmp_path: Path) -> None:
    """A reader who follows the pages has nothing of it in ``git status``."""
    written = {"forking_tokens.svg", "outputs/x", "checkpoints/x", "tensorboard_log/x", ".demo/x"}
    for page in PAGES:
        for line in command_lines(page):
            found = re.findall(r"(?:--output|--figures|entropy-fork report|dump_dir=)[ =](\S+)", line)
            written |= {f"{place}/x" if "." not in place else place for place in found}
    written = {
        place
        for place in written
        if not PLACEHOLDER.search(place) and place[:1] not in "$-/" and not re.match("[A-Z]+\\b", place)
    }
    assert {"report.html", "data/x", "forks/x"} <= written
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_bytes((REPOSITORY / ".gitignore").read_bytes())
    command = ["git", "-C", str(tmp_path), "check-ignore", "--stdin"]
    said = subprocess.run(command, input="\n".join(sorted(written)), capture_output=True, text=True, check=False)
    assert written - set(said.stdout.split()) == set(), "add these to .gitignore"
    # and of the repository's own files none is ignored
    own = subprocess.run(command, input="\n".join(sorted(OWN)), capture_output=True, text=True, check=False)
    assert own.stdout == ""
