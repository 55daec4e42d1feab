"""The words of a command line that name our nodes: what is wrong with them, before Hydra reads them.

Hydra's messages for these mistakes leave out the reason, or advise what would do nothing. The launcher's search path
plugin and ``entropy-fork plan`` ask here first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from entropy_fork.common.asked_for import GROUPS, GUARDS, NODE
from entropy_fork.common.close_names import did_you_mean
from entropy_fork.common.recipes import preset_names, recipes_dir
from entropy_fork.core.rule import KEY_OF
from entropy_fork.verl.config.nodes import MOVED, moved
from entropy_fork.verl.config.schema import EntropyForkConfig, GuardsConfig, default_of

SCHEMAS = {NODE: EntropyForkConfig, GUARDS: GuardsConfig}

#: the preset that switches a node on
ON = {NODE: "global", GUARDS: "on"}

WORD = re.compile(
    rf"(?P<sign>\+{{0,2}}|~)(?P<group>{NODE}|{GUARDS})(?P<package>@[^=.]*)?(?P<key>(\.[\w.-]*)?)(=(?P<value>.*))?",
    re.DOTALL,
)


@dataclass
class Words:
    """What was found in a command line.

    Attributes:
        problems: a message each.
        repaired: the line without the words that are wrong, so that Hydra can read the others.
    """

    problems: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


def check_words(
    overrides: list[str], has_option: Callable[[str, str], bool] = lambda *_: False, plain: bool = True
) -> Words:
    """Look at the words that name our nodes: presets, keys and values.

    Args:
        overrides: the line. A sweep's words (``-m``) may have several values.
        has_option: whether a folder of the user's has an option of a group.
        plain: whether the config is one of verl's, so that the line alone says whether a node is there.
    """
    found = Words()
    there = _brought(overrides) if plain and not _has_groups_of_others(overrides) else None
    for override in overrides:
        match = WORD.fullmatch(override)
        problem = None
        if match and match["sign"] != "~" and not match["package"]:
            group, key, value = match["group"], match["key"].lstrip("."), match["value"]
            repaired = ON[group]  # in place of a wrong preset, so that the keys beside it are read
            if match["key"]:
                problem = _about_key(group, key, value, override)
            elif value is not None:
                problem = _about_preset(group, match["sign"], value, has_option)
                if problem is None and there is not None and not match["sign"] and group not in there:
                    problem, repaired = f"{override} changes a preset, and the line has none. Write +{override}.", value
            if problem and not match["key"]:
                sign = "" if there is not None and group in there and not match["sign"] else "+"
                found.repaired.append(f"{sign}{group}={repaired}")
            elif problem is None and match["key"] and there is not None and not match["sign"] and group not in there:
                problem = (
                    f"{override} changes a key of a node that is not there. Add +{group}={ON[group]} to the line "
                    f"(presets: {', '.join(preset_names(group))})."
                )
                there.append(group)
                found.repaired += [f"+{group}={ON[group]}", override]
        if problem is None:
            found.repaired.append(override)
        else:
            found.problems.append(problem)
    return found


def _has_groups_of_others(overrides: list[str]) -> bool:
    """Whether the line chooses an option that is not ours, which may bring our nodes along."""
    ours = (*GROUPS, NODE, GUARDS)
    for word in overrides:
        group, _, option = word.lstrip("+").partition("=")
        if group in ("recipe", "cluster", "template") and option not in preset_names(group):
            return True
        if word.startswith(("+", "hydra.searchpath")) and "." not in group and group not in ours:
            return True
        if "/" in group or "@" in group:
            return True
    return False


def _brought(overrides: list[str]) -> list[str]:
    """The nodes that a line's presets and recipes bring into the config."""
    there: list[str] = []
    for word in overrides:
        group, _, option = word.lstrip("+").partition("=")
        if word.startswith("+") and (group in SCHEMAS or group.partition(".")[0] in SCHEMAS):
            there.append(group.partition(".")[0])
        elif group == "recipe":
            there += _nodes_of_recipe(option)
    return there


def _nodes_of_recipe(name: str) -> list[str]:
    file = recipes_dir() / "recipe" / f"{name}.yaml"
    if not file.is_file():
        return []
    there: list[str] = []
    defaults: Any = OmegaConf.to_container(OmegaConf.load(file)).get("defaults", [])  # type: ignore[union-attr]
    for entry in defaults:
        if isinstance(entry, str):
            there += _nodes_of_recipe(entry)
        elif isinstance(entry, dict):
            there += [group for key in entry if (group := str(key).split("/")[-1]) in SCHEMAS]
    return there


def _values(override: str) -> list[str] | None:
    """The values of a word, several in a sweep; None where they are no plain values, or Hydra cannot read the word."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return None
    if parsed.is_sweep_override():
        if not parsed.is_choice_sweep():
            return None
        return [str(value) for value in parsed.sweep_string_iterator()]
    return [str(parsed.get_value_element_as_str())]


OFF_WORDS = ("false", "no", "null", "none", "0", "disabled", "~", "")
ON_WORDS = ("true", "yes", "1", "enabled", "default")


def _about_preset(group: str, sign: str, written: str, has_option: Callable[[str, str], bool]) -> str | None:
    known = preset_names(group)
    values = _values(f"{group}={written}") or [written]
    for value in values if len(values) > 1 else [written]:
        option = value.strip("'\"")
        if option in (*known, "schema") or option.startswith(("[", "$")) or has_option(group, option):
            continue
        word = f"{sign}{group}={option}"
        if option.lower() in OFF_WORDS:
            off = "trains on all tokens" if group == NODE else "switches all guards off"
            return f"{word} is not a preset. Write {sign}{group}=off, which {off}."
        if option.lower() in ON_WORDS:
            return f"{word} is not a preset. Write {sign}{group}={ON[group]} (presets: {', '.join(known)})."
        if group == NODE and re.fullmatch(r"[\d.]+%?", option):
            share = _share(option)
            return f"{word} is not a preset. Write {sign}{group}=global {group}.top_ratio={share}."
        return f"{word}: there is no such preset.{did_you_mean(option, known)} Presets: {', '.join(known)}."
    return None


def _about_key(group: str, key: str, written: str | None, override: str) -> str | None:
    schema = SCHEMAS[group]
    known = [each.name for each in fields(schema)]
    if f"{group}.{key}" in MOVED:
        return moved(f"{group}.{key}")
    if key not in known:
        return f"{group} has no key '{key}'.{did_you_mean(key, known)} Keys of {group}: {', '.join(known)}."
    if written is None or written.startswith("${") or written == "???":
        return None
    values = _values(override)
    for value in [written] if values is None else values:
        if "${" in value:
            continue
        try:
            parsed = OverridesParser.create().parse_override(f"{key}={value}").value()
            OmegaConf.merge(OmegaConf.structured(schema), {key: parsed})
        except (HydraException, OmegaConfBaseException) as error:
            if isinstance(error, HydraException) and key in ("where", "score"):
                return (
                    f"Hydra cannot read {group}.{key}={value}. Put the text into quotes of Hydra's, inside those of "
                    f"the shell: '{group}.{key}=\"{value}\"'."
                )
            return f"{group}.{key}={value} is not {_kind(schema, key)}. {_way(group, key, value)}"
    return None


def _kind(schema: type, key: str) -> str:
    hint = get_type_hints(schema)[key]
    kinds = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "a name",
        list[str]: "a list of names",
    }
    return kinds.get(hint, "a name or null")


def _way(group: str, key: str, value: str) -> str:
    """What to write instead."""
    default = next(default_of(each) for each in fields(SCHEMAS[group]) if each.name == key)
    if isinstance(default, list):
        return f"Write {group}.{key}=[{value.strip('[]')}]."
    if several := re.fullmatch(r"\[([^\[\]{}]+)\]", value):
        each = [part.strip() for part in several[1].split(",")]
        line = f" For a run with each value: -m {group}.{key}={','.join(each)}" if len(each) > 1 else ""
        return f"Write one value: {group}.{key}={each[0]}.{line}"
    if isinstance(default, float) and re.fullmatch(r"[\d.]+\s*%", value):
        return f"Write {group}.{key}={_share(value)}."
    if isinstance(default, bool):
        return f"Write {group}.{key}=true or false."
    choices = getattr(KEY_OF.get(key), "values", None)
    if choices:
        return f"Write {group}.{key}={default}, or one of {', '.join(map(str, choices))}."
    return f"Write {group}.{key}={default}, its default, or leave it out."


def _share(text: str) -> str:
    """A share as a decimal: of ``20%``, and of numbers above 1."""
    try:
        number = float(text.rstrip("% "))
    except ValueError:
        return "0.2"
    number = number / 100 if "%" in text or number > 1 else number
    return f"{number:g}" if 0 < number <= 1 else "0.2"
