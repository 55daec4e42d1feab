"""Every preset composes and says what it does; those of the literature do what the header of their file says."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.recorded_choices import RULES as RULES_OF_THEN
from helpers.scored_hook import run_scored
from helpers.scored_rows import ScoredRows, make_batch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from entropy_fork.common.recipes import preset_names, recipes_dir
from entropy_fork.core.rule import TOKEN_MEAN, Rule
from entropy_fork.verl.checks import check_maskable
from entropy_fork.verl.config import EntropyForkConfig, read_config, selection_name
from entropy_fork.verl.policy_loss import CLIP_HIGHEST, CLIP_LOWEST

Token = dict[str, float]

#: rows of a mini-batch; verl's clip range is 0.2 and 0.28 in ``helpers/hook.py``
ROWS, LOW, HIGH = 8, 0.2, 0.28


def single(value: float) -> float:
    """Rounded to float32, in which scores are compared."""
    return float(np.float32(value))


@functools.cache
def composed(*overrides: str) -> Any:
    """verl's config as main_ppo composes it, made once."""
    import verl.trainer.main_ppo as main_ppo

    with initialize_config_dir(str(Path(main_ppo.__file__).parent / "config"), version_base=None):
        return hydra_compose("ppo_trainer", overrides=list(overrides))


def config_of(name: str) -> EntropyForkConfig:
    config = read_config(composed(f"+entropy_fork={name}"))
    assert config is not None
    return config


def of_literature() -> list[str]:
    return [name for name in preset_names("entropy_fork") if name not in ("off", *RULES_OF_THEN)]


@pytest.mark.parametrize("name", preset_names("entropy_fork"))
def test_a_preset_composes_passes_the_checks_and_says_what_it_does(name: str) -> None:
    config = composed(f"+entropy_fork={name}")
    fork_config = read_config(config)
    header = [
        line for line in (recipes_dir() / "entropy_fork" / f"{name}.yaml").read_text().splitlines() if line[:1] == "#"
    ]
    assert any(f"entropy_fork={name}" in line for line in header), "the header has a command to copy"
    if name == "off":
        assert fork_config is None
        return
    assert fork_config is not None
    check_maskable(config, fork_config)
    sentence = fork_config.rule(TOKEN_MEAN).describe()
    assert sentence.startswith("Trains on ")
    assert sentence.endswith(".")
    assert "`" not in sentence
    assert "  " not in sentence
    assert sentence.count(".") == sentence.count(". ") + 1 or any(character.isdigit() for character in sentence)


def test_runs_of_two_presets_have_two_names() -> None:
    names = {preset: selection_name(composed(f"+entropy_fork={preset}")) for preset in preset_names("entropy_fork")}
    assert len(set(names.values())) == len(names), names


@pytest.mark.parametrize("name", of_literature())
def test_the_header_of_a_preset_of_the_literature_says_source_and_what_is_exact(name: str) -> None:
    header = "".join(line for line in (recipes_dir() / "entropy_fork" / f"{name}.yaml").open() if line[:1] == "#")
    if name != "matched_random":
        assert "arXiv 2" in header
        assert "#   exact: " in header
        assert any(word in header for word in ("not exact: ", "left out: ", "chosen here: ", "without another"))


@pytest.mark.parametrize("name", [name for name in RULES_OF_THEN if name in preset_names("entropy_fork")])
def test_the_presets_of_then_are_the_recorded_rules(name: str) -> None:
    """``tests/core/test_recorded_choices.py`` compares what these rules choose with what they chose then."""
    assert config_of(name).rule(TOKEN_MEAN) == RULES_OF_THEN[name]


# --- what each does on a small batch ----------------------------------------------------------------------------------

#: what the workers are given for a token: its weight, its advantage, and the lowest and the highest ratio
Given = tuple[float, float, float | None, float | None]


def ranked(tokens: list[Token], score: Callable[[Token], float]) -> list[Token]:
    """From the highest score to the lowest; equal ones from the first in their responses to the last."""
    return sorted(tokens, key=lambda token: (-single(score(token)), token["position"], token["row"]))


def top(tokens: list[Token], score: Callable[[Token], float], share: float) -> list[Token]:
    return ranked(tokens, score)[: math.ceil(share * len(tokens) - 1e-9)]


def masked(tokens: list[Token], kept: list[Token]) -> list[Given]:
    """A kept token weighs all / kept."""
    names = {id(token) for token in kept}
    weight = len(tokens) / len(kept)
    return [(weight if id(token) in names else 0.0, token["advantage"], None, None) for token in tokens]


def archer(tokens: list[Token]) -> list[Given]:
    open_choices = [
        token
        for row in {token["row"] for token in tokens}
        for token in top([token for token in tokens if token["row"] == row], lambda token: token["entropy"], 0.2)
    ]
    return [
        (1.0, token["advantage"], *((1 - 2.5 * LOW, 1 + 2.5 * HIGH) if token in open_choices else (1 - LOW, 1 + HIGH)))
        for token in tokens
    ]


def dcpo(tokens: list[Token]) -> list[Given]:
    def ends(p: float) -> tuple[float, float]:
        lowest = 0.5 + 0.5 * math.sqrt(max(1 - 4 * LOW / p, 0.0))
        return lowest, min(0.5 + 0.5 * math.sqrt(1 + 4 * HIGH / p), 10.0)

    return [(1.0, token["advantage"], *ends(math.exp(token["log_prob"]))) for token in tokens]


def clip_cov_exact(tokens: list[Token]) -> list[Given]:
    means = {name: math.fsum(token[name] for token in tokens) / len(tokens) for name in ("advantage", "log_prob")}

    def covariance(token: Token) -> float:
        return (token["advantage"] - means["advantage"]) * (token["log_prob"] - means["log_prob"])

    number = len(tokens) - math.ceil(0.9998 * len(tokens) - 1e-9)
    assert number > 0
    dropped = {id(token) for token in sorted(tokens, key=covariance)[-number:]}
    return [(0.0 if id(token) in dropped else 1.0, token["advantage"], None, None) for token in tokens]


def ar(tokens: list[Token]) -> list[Given]:
    return [(0.2 * math.exp(token["log_prob"]) + 1 - 0.2, token["advantage"], None, None) for token in tokens]


def steer(tokens: list[Token]) -> list[Given]:
    omega = [
        abs(token["advantage"] * (1 - math.exp(token["log_prob"])) * (token["log_prob"] + token["entropy"]))
        for token in tokens
    ]
    lowest, highest = min(omega), max(omega)
    return [
        (1.2 - 0.4 * (value - lowest) / (highest - lowest), token["advantage"], None, None)
        for token, value in zip(tokens, omega, strict=True)
    ]


def stapo(tokens: list[Token]) -> list[Given]:
    unlikely = [token for token in tokens if token["advantage"] > 0 and math.exp(token["log_prob"]) < 0.002]
    assert len(unlikely) > 3
    open_choices = top(unlikely, lambda token: token["entropy"], 0.25)
    spurious = [token for token in unlikely if token not in open_choices]
    return masked(tokens, [token for token in tokens if token not in spurious])


def gmts(tokens: list[Token]) -> list[Given]:
    return masked(tokens, top(tokens, lambda token: abs(token["advantage"]) * token["entropy"], 0.2))


def rsi(tokens: list[Token]) -> list[Given]:
    order = ranked(tokens, lambda token: -token["log_prob"] / max(token["entropy"], 1e-6))
    first, end = (math.ceil(share * len(tokens) - 1e-9) for share in (0.05, 0.5))
    return masked(tokens, order[first:end])


def entropy_advantage(tokens: list[Token]) -> list[Given]:
    return [
        (1.0, token["advantage"] + min(0.4 * token["entropy"], abs(token["advantage"]) / 2), None, None)
        for token in tokens
    ]


#: each preset of the literature, restated from its header: from the tokens of a mini-batch to what the workers get
RESTATED = {
    "archer": archer,
    "dcpo": dcpo,
    "clip_cov_exact": clip_cov_exact,
    "ar": ar,
    "steer": steer,
    "stapo": stapo,
    "gmts": gmts,
    "rsi": rsi,
    "entropy_advantage": entropy_advantage,
}


def batch_for(name: str, seed: int) -> ScoredRows:
    if name == "clip_cov_exact":  # so large that it drops a token
        rows = make_batch(seed, num_rows=2 * ROWS, longest=2500)
        random = torch.Generator().manual_seed(seed)
        noisy = [values - torch.rand(len(values), generator=random) for values in rows.fields["log_prob"]]
        rows.fields["log_prob"] = noisy
        return rows
    rows = make_batch(seed, num_rows=2 * ROWS)
    if name == "stapo":  # more tokens, some with probabilities below 0.002
        rows = make_batch(seed, num_rows=2 * ROWS, longest=60)
        rows.fields["log_prob"] = [4 * values for values in rows.fields["log_prob"]]
    return rows


def given_to_workers(
    monkeypatch: pytest.MonkeyPatch, rows: ScoredRows, config: EntropyForkConfig
) -> list[dict[str, torch.Tensor]]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    fields, _ = run_scored(monkeypatch, rows, list(range(len(rows))), values)
    names = ("rollout_is_weights", "advantages", CLIP_LOWEST, CLIP_HIGHEST)
    return [{name: fields[name][row] for name in names if name in fields} for row in range(len(rows))]


@pytest.mark.parametrize("name", of_literature())
def test_a_preset_of_the_literature_is_its_formula(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On two mini-batches of made-up tokens, some of them outside of the mask."""
    if name == "matched_random":
        return
    assert name in RESTATED, "a new preset of the literature needs a line in RESTATED"
    rows = batch_for(name, seed=5)
    given = given_to_workers(monkeypatch, rows, config_of(name))
    for number in range(2):
        members = range(number * ROWS, (number + 1) * ROWS)
        tokens = [token for token in rows.eligible_tokens() if token["row"] in members]
        expected = iter(RESTATED[name](tokens))
        for row in members:
            lowest, highest = (given[row].get(end) for end in (CLIP_LOWEST, CLIP_HIGHEST))
            assert (lowest is None) is (name not in ("archer", "dcpo"))
            for place, eligible in enumerate(rows.masks[row].tolist()):
                weight = float(given[row]["rollout_is_weights"][place])
                if not eligible:
                    assert weight == 0.0
                    continue
                wanted_weight, wanted_advantage, bottom, top_end = next(expected)
                assert weight == pytest.approx(wanted_weight, rel=2e-6, abs=1e-9), (row, place)
                assert float(given[row]["advantages"][place]) == pytest.approx(wanted_advantage, rel=1e-6)
                if lowest is not None and highest is not None:
                    assert float(lowest[place]) == pytest.approx(bottom, rel=1e-6)
                    assert float(highest[place]) == pytest.approx(top_end, rel=1e-6)


def test_the_control_keeps_as_many_tokens_of_each_answer_as_global(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_batch(6, num_rows=2 * ROWS)
    by_entropy, drawn = (given_to_workers(monkeypatch, rows, config_of(name)) for name in ("global", "matched_random"))
    kept = [[of_row["rollout_is_weights"] != 0 for of_row in given] for given in (by_entropy, drawn)]
    assert [int(row.sum()) for row in kept[0]] == [int(row.sum()) for row in kept[1]]
    assert any(not torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_a_config_without_the_new_keys_is_the_default_of_each() -> None:
    assert EntropyForkConfig().rule(TOKEN_MEAN) == Rule.of()
