"""The vocabulary of the rule: every value has a sentence, and every combination that is allowed has a description."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from itertools import product
from typing import Any

import pytest
from omegaconf import OmegaConf

from entropy_fork.core.rule import KEY_OF, KEYS, ONLY_WITH, Key, Rule, has_effect
from entropy_fork.core.schedule import rule_at
from entropy_fork.preflight.doctor import sentences
from entropy_fork.preflight.plan import mask_in_words
from entropy_fork.verl.config import RULE_KEYS, EntropyForkConfig, GuardsConfig, keys

#: values of the keys that are numbers, with which every value of the other keys is possible
NUMBERS = {"top_ratio": 0.3, "final_ratio": 0.5, "schedule_steps": 40, "seed": 7}

VALUES = [(key, value) for key in KEYS for value in key.values]


#: the keys about what is done with a score; the other keys are about which tokens are kept
ABOUT_USE = ("control", "use", "map", "normalize", "combine", "outside")


def combinations() -> Iterator[dict[str, Any]]:
    """Every combination of values, allowed or not: of the keys about use, and of the other keys."""
    named = [key for key in KEYS if key.values]
    usual = {key.name: key.default for key in KEYS} | NUMBERS
    for about_use in (False, True):
        some = [key for key in named if (key.name in ABOUT_USE) == about_use]
        for values in product(*(key.values for key in some)):
            chosen = dict(zip([key.name for key in some], values, strict=True))
            if not about_use:
                yield {**usual, **chosen, "band_from": 0.1 if chosen["select"] == "band" else 0.0}
                continue
            for where in ("", "advantage > 0"):
                yield {**usual, **chosen, "score": "surprisal", "where": where}


def rule_or_none(values: dict[str, Any]) -> Rule | None:
    try:
        return Rule.of(**values)
    except ValueError:
        return None


RULES = [(values, rule) for values in combinations() if (rule := rule_or_none(values)) is not None]


@pytest.mark.parametrize(("key", "value"), VALUES, ids=lambda x: x.name if isinstance(x, Key) else x)
def test_every_value_can_be_used_and_has_a_sentence_about_the_run(key: Key, value: str) -> None:
    """The sentence begins with a verb about the run, because a description uses the part before its first colon."""
    assert re.fullmatch(r"[A-Z][a-z]+s [^:]+[^.:](: .+)?\.", key.values[value]), key.values[value]
    named = re.findall(r"`([^`]+)`", key.values[value])
    assert set(named) <= set(KEY_OF), "only keys stand in backticks"
    assert any(values[key.name] == value for values, _ in RULES), "no combination with it is allowed"


def test_every_key_has_a_sentence() -> None:
    for key in (*KEYS, *keys(), *keys(GuardsConfig)):
        assert re.match(r"[A-Zρ].*\.$", key.sentence, re.DOTALL), key
        assert not key.values or key.default in key.values
    for ways in ONLY_WITH.values():
        for way in ways:
            for other, values in way.items():
                assert other in KEY_OF
                assert other == "score" or set(values) <= set(KEY_OF[other].values)


def test_every_combination_has_one_description_that_tells_all_of_it() -> None:
    """Two rules that train differently have different descriptions, and every key that has an effect is in them."""
    described: dict[str, dict[str, Any]] = {}
    for values, rule in RULES:
        assert rule.values == values
        text = rule.describe()
        assert re.fullmatch(r"Trains on .+\.", text)
        assert not re.search(r"[`{}:]", text.replace(":", "", 1)), text
        assert text.count(". ") == 0, "one sentence"
        effective = {name: value for name, value in values.items() if has_effect(name, values)}
        assert described.setdefault(text, effective) == effective
    assert len(described) > 500


@pytest.mark.parametrize(("key", "value"), [pair for pair in VALUES if pair[0].name != "loss_agg_mode"])
def test_every_value_is_told_by_doctor_and_plan(key: Key, value: str) -> None:
    values = next(values for values, _ in RULES if values[key.name] == value)
    mode = values["loss_agg_mode"]
    fork_config = EntropyForkConfig(**{name: values[name] for name in RULE_KEYS})
    rule = fork_config.rule(mode)
    assert rule == Rule.of(**values)
    config = {"entropy_fork": fork_config, "actor_rollout_ref": {"actor": {"loss_agg_mode": mode}}}
    assert mask_in_words(OmegaConf.create(config)) == rule.describe()
    assert sentences(fork_config, mode) == rule.sentences()


def test_the_sentence_of_the_default() -> None:
    assert Rule.of().describe() == (
        "Trains on 20% of the response tokens: keeps the tokens with the highest entropy, measures the tokens under "
        "the old policy, selects in each mini-batch over all ranks, keeps exactly that share, rounded up to whole "
        "tokens, divides the loss by the number of kept tokens and weighs every kept token the same."
    )
    assert Rule.of(top_ratio=1.0).describe() == "Trains on all response tokens: the update is verl's own, bit for bit."
    assert Rule.of(top_ratio=1.0, weight="soft").describe().startswith("Trains on all response tokens: keeps the")


def test_numbers_stand_in_the_sentence() -> None:
    band = Rule.of(
        select="band", band_from=0.05, top_ratio=0.3, schedule="linear", final_ratio=0.5, schedule_steps=40
    ).describe()
    assert "Trains on 25% of the response tokens at step 1" in band
    assert "between the top 5% and the top 30%" in band
    assert "from 30% at step 1 to 50% at step 40" in band
    assert "seed 9" in Rule.of(select="random", seed=9).describe()


def test_a_rule_of_a_step_is_constant() -> None:
    rule = Rule.of(schedule="linear", final_ratio=1.0, schedule_steps=11, pool="batch")
    assert rule_at(rule, 1) == Rule.of(top_ratio=0.2, pool="batch")
    assert rule_at(rule, 6).selector.top_ratio == pytest.approx(0.6)
    assert (rule_at(rule, 6).schedule, rule_at(rule, 6).pool) == ("constant", "batch")
    assert rule_at(rule, 11) == rule_at(rule, 99) == Rule.of(top_ratio=1.0, pool="batch")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"topratio": 0.1}, "there is no key topratio; the keys are top_ratio, score, select, "),
        ({"schedule": "stairs"}, "schedule must be one of .+, got 'stairs'"),
        ({"schedule": "linear"}, "schedule=linear needs schedule_steps"),
        ({"schedule": "linear", "schedule_steps": 5, "final_ratio": 1.5}, r"must be in \(0, 1\], got 1.5"),
        (
            {"select": "band", "band_from": 0.1, "schedule": "linear", "schedule_steps": 5, "final_ratio": 0.05},
            r"band_from must be in \(0, top_ratio\)",
        ),
    ],
)
def test_a_rule_of_a_whole_run_without_meaning_is_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Rule.of(**values)


@pytest.mark.parametrize("key", [key for key in KEYS if key.values], ids=lambda key: key.name)
def test_an_unknown_value_is_refused_with_all_known_ones(key: Key) -> None:
    known = ", ".join(key.values)
    with pytest.raises(ValueError, match=f"^{key.name} must be one of {known}, got 'upper'$"):
        Rule.of(**{key.name: "upper"})


def test_the_node_has_the_keys_and_defaults_of_the_rule() -> None:
    assert [key for key in keys() if key.name in RULE_KEYS] == [key for key in KEYS if key.name != "loss_agg_mode"]
    assert [key.name for key in keys()] == [field.name for field in fields(EntropyForkConfig)]
    assert all(getattr(EntropyForkConfig(), key.name) == key.default for key in keys())
    assert EntropyForkConfig().rule("token-mean") == Rule.of()
