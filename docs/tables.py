"""The tables of the reference, made from the code: keys, scores, presets, recipes, clusters, commands, metrics.

A page of docs/reference asks for one with a line ``<!-- table: NAME -->``, and docs/site.py puts it there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer.main
import yaml
from omegaconf import OmegaConf

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # the package of this checkout, installed or not

from entropy_fork.cli import app  # noqa: E402
from entropy_fork.core.rule import KEYS, Key, Rule  # noqa: E402
from entropy_fork.core.scores import FIELDS, SCORES, Score  # noqa: E402
from entropy_fork.core.scoring import OF_ROWS  # noqa: E402
from entropy_fork.core.tally import METRICS  # noqa: E402
from entropy_fork.reward.matching import EXAMPLES  # noqa: E402
from entropy_fork.reward.rules import RULES  # noqa: E402
from entropy_fork.reward.spelling import SPELLING  # noqa: E402
from entropy_fork.verl.config.schema import EntropyForkConfig, GuardsConfig, keys  # noqa: E402
from entropy_fork.verl.scores_of_run import unscorable  # noqa: E402

#: the place of a table, and the line in italics that readers of the plain Markdown get in its stead
PLACE = re.compile(r"<!-- table: ([\w-]+) -->\n(?:\n\*.+\*\n)?")


NODES = {"entropy_fork": keys(EntropyForkConfig), "entropy_fork_guards": keys(GuardsConfig)}


def fill(markdown: str) -> str:
    """Put the tables into the places of a page.

    Raises:
        KeyError: the page asks for a table that is not in ``TABLES``.
    """
    return PLACE.sub(lambda place: TABLES[place[1]]() + "\n", markdown)


def keys_table(keys: Iterable[Key]) -> str:
    """A row for each key; below one with a list of values a row for each."""
    rows = []
    for key in keys:
        default = "" if key.values else f"`{_yaml(key.default)}`"
        rows.append((f"`{key.name}`", default, key.sentence.replace("``", "`")))
        for value, meaning in key.values.items():
            rows.append(("", f"`{value}`" + " (default)" * (value == key.default), meaning.replace("``", "`")))
    return table(("key", "default or values", "meaning"), rows)


def metrics() -> str:
    """A row for each metric."""
    return table(("metric", "meaning"), [(f"`entropy_fork/{name}`", meaning) for name, meaning in METRICS.items()])


def scores() -> str:
    """A row for each built-in score: what it is."""
    rows = [(f"`{s.name}`", s.formula, s.sentence.partition(": ")[2].capitalize(), s.source) for s in SCORES.values()]
    return table(("score", "formula", "what it is", "source"), rows)


#: verl's fields of the batch that the driver does not read for other purposes: {field of a score: field of verl}
MORE_TO_READ = {
    "log_prob": "old_log_probs",
    "ref_log_prob": "ref_log_prob",
    "rollout_log_prob": "rollout_log_probs",
    "sum_pi_squared": "sum_pi_squared",
}


def score_costs() -> str:
    """A row for each built-in score: what it reads, and what it costs with either policy."""
    rows = [
        (f"`{score.name}`", ", ".join(f"`{name}`" for name in score.fields), _with_old(score), _with_current(score))
        for score in SCORES.values()
    ]
    return table(("score", "reads", "`entropy=old`: the driver", "`entropy=current`: the worker"), rows)


def _with_old(score: Score) -> str:
    read = [f"`{MORE_TO_READ[name]}`" for name in score.fields if name in MORE_TO_READ]
    pays = "; the log-prob pass computes Σπ² over the vocabulary" if "sum_pi_squared" in score.fields else ""
    return f"reads {' and '.join(read)} of the batch too{pays}" if read else "nothing more to read"


def _with_current(score: Score) -> str:
    """What the current policy's score costs in the worker, asked of the rule itself."""
    try:
        in_loss = Rule.of(score=score.name, entropy="current", pool="micro_batch").selected_in_loss
    except ValueError:
        return "refused"
    return "a forward pass; none with `pool=micro_batch`" if in_loss else "a forward pass"


#: a run of verl that computes nothing which a score may need beside the usual
BARE = OmegaConf.create(
    {
        "actor_rollout_ref": {
            "actor": {"use_kl_loss": False, "shuffle": False, "strategy": "fsdp2"},
            "rollout": {"calculate_log_probs": False},
            "model": {"use_fused_kernels": True},
        },
        "algorithm": {"use_kl_in_reward": False},
    }
)


def score_fields() -> str:
    """A row for each field, with what a run needs to have it: what the checks of the launcher answer."""
    rows = [(f"`{name}`", meaning, CODE.sub(r"`\1`", _needed_for(name))) for name, meaning in FIELDS.items()]
    return table(("field", "meaning", "what a run needs"), rows)


def _needed_for(field: str) -> str:
    if field in OF_ROWS:
        return "Nothing: it is made where the tokens are selected."
    for message in unscorable(BARE, EntropyForkConfig(where=f"{field} > 0")):
        needed = message.partition(f" reads {field}, which needs ")[2]
        return needed[0].upper() + needed[1:]
    return "Nothing: every run with a mask has it."


def files(group: str) -> str:
    """A section for each file of a folder of recipes/: what its first comment says, and its keys if there are few."""
    sections = []
    for file in sorted((REPOSITORY / "recipes" / group).glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        comment = re.match(r"(?:#.*\n)*", text)
        assert comment is not None
        lines = [line.removeprefix("#").removeprefix(" ") for line in comment[0].splitlines()]
        sections.append(f"### `{file.stem}`\n\n{_comment(line for line in lines if not line.startswith('@package'))}")
        keys = {key: value for key, value in yaml.safe_load(text).items() if key != "defaults"}
        if group.startswith("entropy_fork"):
            sections.append(", ".join(f"`{key}={_yaml(value)}`" for key, value in keys.items()))
    return "\n\n".join(sections)


def _comment(lines: Iterable[str]) -> str:
    """Prose as prose; what is indented as it stands."""
    blocks: list[tuple[bool, list[str]]] = []
    for line in lines:
        literal = line.startswith("  ")
        if not blocks or blocks[-1][0] != literal:
            blocks.append((literal, []))
        blocks[-1][1].append(line)
    return "\n\n".join(
        "```output\n" + "\n".join(line.removeprefix("  ") for line in block) + "\n```" if literal else _escaped(block)
        for literal, block in blocks
    )


#: code that stands without backticks in the prose of a YAML file or a help text: a setting, an option, a path
CODE = re.compile(
    r"(?<![\w`/])("
    r"--[a-z][\w-]*"  # --option
    r"|[+…]?[\w./-]*(?:=|_)[\w./=,+-]*\w"  # key=value, a_name, …/global_step_N
    r"|docs/[\w./]+\w"
    r"|<\S+>"
    r")(?![\w`])"
)


def _escaped(lines: Iterable[str]) -> str:
    text = CODE.sub(r"`\1`", " ".join(line.strip() for line in lines))
    return "`".join(
        part if number % 2 else re.sub(r"([<>*_\[\\])", r"\\\1", part) for number, part in enumerate(text.split("`"))
    )


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).splitlines()[0]


def commands() -> str:
    """A section for each command, with a row for each argument and option."""
    return "\n\n".join(_sections(typer.main.get_command(app), "entropy-fork"))


def _sections(command: Any, name: str) -> Iterable[str]:
    for child, below in getattr(command, "commands", {}).items():
        yield from _sections(below, f"{name} {child}")
    if not hasattr(command, "commands"):
        context = command.make_context(name, [], resilient_parsing=True)
        about, *examples = command.help.split("\n\n")
        lines = [f"{name} {' '.join(command.collect_usage_pieces(context))}", *(line.strip() for line in examples)]
        yield f"### `{name}`\n\n{_escaped([about])}\n\n```output\n" + "\n".join(lines) + "\n```"
        records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
        rows = [(f"`{record[0]}`", _help(record[1])) for record in records if record and "--help" not in record[0]]
        if rows:  # a header alone says nothing
            yield table(("argument, option", "meaning"), rows)


def _help(text: str) -> str:
    return _escaped([re.sub(r"\[([^]]*)\]$", r"(\1)", text)])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def spelling() -> str:
    """A row for each rule of spelling, in their order."""
    rows = []
    for number, each in enumerate(SPELLING, 1):
        examples = ", ".join(f"{_code(before)} → {_code(after)}" for before, after in each.examples)
        rows.append((f"{number}", _escaped([each.says]), examples))
    return table(("", "what it does", "examples"), rows)


def matching() -> str:
    """A row for each rule of matching, in their order."""
    rows = []
    for number, each in enumerate(RULES, 1):
        says = (each.__doc__ or "").splitlines()[0].replace("``", "`")
        pairs = EXAMPLES[each.__name__]
        examples = ", ".join(
            f"{_code(answer)} {'=' if equal else '≠'} {_code(truth)}" for answer, truth, equal in pairs
        )
        rows.append((f"{number}", says, examples))
    return table(("", "what it says", "examples"), rows)


def _code(text: str) -> str:
    """Text as code, also with a backtick in it."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


TABLES: Mapping[str, Callable[[], str]] = {
    "keys": lambda: keys_table(NODES["entropy_fork"]),
    "guards": lambda: keys_table(NODES["entropy_fork_guards"]),
    "aggregation": lambda: keys_table([key for key in KEYS if key.name == "loss_agg_mode"]),
    "presets": lambda: files("entropy_fork"),
    "guard-presets": lambda: files("entropy_fork_guards"),
    "recipes": lambda: files("recipe"),
    "clusters": lambda: files("cluster"),
    "templates": lambda: files("template"),
    "commands": commands,
    "metrics": metrics,
    "scores": scores,
    "score-costs": score_costs,
    "fields": score_fields,
    "spelling": spelling,
    "matching": matching,
}
