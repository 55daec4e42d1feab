"""What 'make docs' adds to MkDocs: pages from outside docs/, links as they stand on GitHub, the reference.

MkDocs wants all pages below one folder. This hook adds the others. README.md becomes the first page. CONTRIBUTING.md,
SECURITY.md and CHANGELOG.md become pages of their own, and so does each public module. A link to any other file of the
repository becomes a link to a copy. The tables of the reference are made from the code (docs/tables.py). A link to a
file that does not exist is left as it is, and the build, which is strict, fails on it.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

import griffe
import tables
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "entropy_fork"
PAGES = ("*.md", "examples/**/README.md")
MODULES = "reference/modules/"
LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(?=[)#])|(?<= src=\")([^\":]+)(?=\")")
CODE = re.compile(r"`[^`]+`")
FENCE = re.compile(r"^ *(```|~~~)")
BLOCK = re.compile(r"^( *)```([\w-]*)\n(.*?^\1```)$", re.MULTILINE | re.DOTALL)
#: what the frames of a table and other drawings are made of
DRAWN = re.compile(r"[\u2500-\u259f]")
#: a table of a docstring: a line of ===, a line of names, a line of ===, rows, a line of ===
SIMPLE_TABLE = re.compile(r"^(=+(?: +=+)+)\n(.+)\n\1\n((?:.+\n)+?)\1$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the modules at the end of the reference: core first, because a reader starts there."""
    assert config.nav is not None
    rooms: dict[str, list[Any]] = {"core": []}
    for module in modules():
        path = module.split(".")[1:]
        is_room = (REPOSITORY / module.replace(".", "/")).is_dir()
        room = path[0] if path and (is_room or len(path) > 1) else PACKAGE
        rooms.setdefault(room, []).append({module if is_room else path[-1]: reference_page(module)})
    rooms[PACKAGE] = rooms.pop(PACKAGE)  # last
    shelf = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    shelf.append({"Modules": [{room: pages} for room, pages in rooms.items()]})
    config.watch.append(str(REPOSITORY / PACKAGE))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/, the modules, and the files that a page has a link to."""
    for path in sorted(path for pattern in PAGES for path in REPOSITORY.glob(pattern)):
        place = path.relative_to(REPOSITORY).as_posix()
        files.append(File.generated(config, site_place(place), abs_src_path=str(path)))
    for module in modules():
        files.append(File.generated(config, reference_page(module), content=f"::: {module}\n"))
    for page in list(files.documentation_pages()):
        for target in linked_files(page):
            if files.get_file_from_path(site_place(target)) is None:
                files.append(File.generated(config, site_place(target), abs_src_path=str(REPOSITORY / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    source = repository_place(page.file.src_uri)
    here = PurePosixPath(page.file.src_uri).parent.as_posix()

    def in_site(match: re.Match[str]) -> str:
        target = normpath((PurePosixPath(source).parent / match[0]).as_posix())
        place = site_place(target)
        return match[0] if files.get_file_from_path(place) is None else relpath(place, here)

    text = BLOCK.sub(wrapped, tables.fill(markdown))
    return outside_code(without_escapes(text), in_site)


def wrapped(block: re.Match[str]) -> str:
    """Let the long lines of plain text wrap (site.css), so that no end is out of sight; but not those of a drawing."""
    indent, language, rest = block.groups()
    return f"{indent}```output\n{rest}" if language in ("", "text") and not DRAWN.search(rest) else block[0]


def markdown_table(simple: re.Match[str]) -> str:
    """Turn a table of a docstring into one of Markdown. A line without a first cell goes on with the row above it."""
    starts = [column.start() for column in re.finditer(r"=+", simple[1])]

    def cells(line: str) -> list[str]:
        ends = [*starts[1:], len(line)]
        return [line[start:end].strip().replace("``", "`") for start, end in zip(starts, ends, strict=True)]

    rows: list[list[str]] = []
    for row in map(cells, simple[3].splitlines()):
        if row[0] or not rows:
            rows.append(row)
        else:
            rows[-1] = [f"{above} {more}".strip() for above, more in zip(rows[-1], row, strict=True)]
    return tables.table(cells(simple[2]), rows)


def without_escapes(markdown: str) -> str:
    r"""Take the backslash from ``\|`` in the code of a table: GitHub needs it there, and MkDocs would show it."""
    lines = markdown.split("\n")
    return "\n".join(
        CODE.sub(lambda code: code[0].replace(r"\|", "|"), line) if line[:1] == "|" else line for line in lines
    )


def modules() -> list[str]:
    """The public modules of the package, a room before what is in it."""
    names = []
    for file in sorted((REPOSITORY / PACKAGE).rglob("*.py"), key=lambda file: file.parts):
        module = file.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        if not module.rpartition(".")[2].startswith("_"):
            names.append(module)
    return names


def reference_page(module: str) -> str:
    """Where the page of a module is."""
    return f"{MODULES}{module}.md"


def site_place(place: str) -> str:
    """Where a file of the repository is in the site."""
    if place == "README.md":
        return "index.md"
    if place.endswith(".py") and place.startswith(f"{PACKAGE}/"):
        return reference_page(place.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    if place.endswith(".md") and "/" not in place:
        return f"project/{place}"  # SECURITY.md is another page than docs/reference/security.md
    return place.removeprefix("docs/")


def repository_place(place: str) -> str:
    """The file of the repository that a page of the site is made of."""
    if place == "index.md":
        return "README.md"
    if place.startswith("project/"):
        return place.removeprefix("project/")
    return place if (REPOSITORY / place).is_file() else f"docs/{place}"


def linked_files(page: File) -> list[str]:
    """The files of the repository, other than pages, that a page has links to."""
    if page.src_uri.startswith(MODULES):
        return []
    found: list[str] = []
    source = PurePosixPath(repository_place(page.src_uri))

    def note(match: re.Match[str]) -> str:
        found.append(normpath((source.parent / match[0]).as_posix()))
        return match[0]

    outside_code(page.content_string, note)
    return [target for target in found if (REPOSITORY / target).is_file()]


def outside_code(markdown: str, replace: Any) -> str:
    """Apply ``replace`` to the links of a text that do not stand in a block of code."""
    lines, fenced = [], False
    for line in markdown.split("\n"):
        fenced ^= bool(FENCE.match(line))
        lines.append(line if fenced else LINK.sub(replace, line))
    return "\n".join(lines)


class Reference(griffe.Extension):
    """What our docstrings have and Markdown has not: roles such as ``:func:``, and ``#:`` above a constant."""

    ROLE = re.compile(r":(?:func|class|data|meth|mod|attr):`(~?)([\w.]+)`")

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Griffe's hook when everything has been read, so that a name can be looked up where it is used."""
        self._rewrite(pkg)

    def _rewrite(self, scope: griffe.Object) -> None:
        for member in scope.members.values():
            if isinstance(member, griffe.Attribute) and isinstance(scope, griffe.Module):
                self._take_comment(member, scope)
            if isinstance(member, griffe.Object):
                self._rewrite(member)
        if scope.docstring is not None:
            text = SIMPLE_TABLE.sub(markdown_table, scope.docstring.value)
            text = self.ROLE.sub(lambda role: self._link(scope, role), text)
            # Markdown needs no sign that what is indented is literal.
            scope.docstring.value = re.sub(r"(?m)(\S?) *::$", lambda end: end[1] and f"{end[1]}:", text)

    def _take_comment(self, constant: griffe.Attribute, module: griffe.Module) -> None:
        assert isinstance(module.filepath, Path)
        lines = module.lines_collection[module.filepath]
        first = last = (constant.lineno or 1) - 1
        while first > 0 and lines[first - 1].startswith("#:"):
            first -= 1
        if first < last:
            text = "\n".join(line.removeprefix("#:").strip() for line in lines[first:last])
            constant.docstring = griffe.Docstring(text, lineno=first + 1, endlineno=last, parent=constant)

    def _link(self, scope: griffe.Object, role: re.Match[str]) -> str:
        short, name = role[1] == "~", role[2]
        first, _, rest = name.partition(".")
        try:
            target = name if first == PACKAGE else scope.resolve(first) + (f".{rest}" if rest else "")
        except griffe.NameResolutionError:
            target = name  # of nothing that is ours: the strict build says so
        return f"[`{name.rpartition('.')[2] if short else name}`][{target}]"
