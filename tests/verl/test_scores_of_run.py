"""What a run's scores read, and everything wrong with them, said in one line before Ray starts or at the step."""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scored_hook import run_scored
from helpers.scored_rows import make_batch

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.core.scores import SCORES, score_of
from entropy_fork.core.where import where_of
from entropy_fork.verl.checks import check_maskable, find_problems
from entropy_fork.verl.config import EntropyForkConfig, read_config
from entropy_fork.verl.scores_of_run import fields_read, own_functions, scores_read

Compose = Callable[..., Any]

OWN = '''
import torch

def good(log_prob, entropy):
    """A score of a test."""
    return -log_prob / (entropy + 1)

def sure(log_prob):
    return log_prob > -1

def no_fields():
    return 1

def unknown(entropies):
    return entropies

def short(entropy):
    return entropy[:-1]

def whole(entropy):
    return entropy.long()

def broken(entropy):
    return entropy / 0

def raising(entropy):
    raise RuntimeError("out of ideas")

def changing(entropy):
    return entropy.mul_(2)

def drawing(entropy):
    return torch.rand_like(entropy)

def by_place(entropy):
    return entropy + torch.arange(entropy.numel())

def floats(entropy):
    return entropy

def not_in_this_run(rollout_log_prob):
    return rollout_log_prob

def reference(ref_log_prob):
    return ref_log_prob > -1

def squares(sum_pi_squared):
    return sum_pi_squared

def many_only(entropy):
    if entropy.numel() > 60:
        raise RuntimeError("too many tokens")
    return entropy

def nan_of_many(entropy):
    return entropy / (entropy.numel() <= 60)

def short_of_many(entropy):
    return entropy[: 60]

def where_many(entropy):
    if entropy.numel() > 60:
        raise RuntimeError("too many tokens")
    return entropy > 0

not_a_function = 3
'''


@pytest.fixture(autouse=True)
def own_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "scores_of_a_test.py").write_text(textwrap.dedent(OWN))
    (tmp_path / "broken_of_a_test.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("scores_of_a_test", "broken_of_a_test"):
        sys.modules.pop(name, None)
    score_of.cache_clear()
    where_of.cache_clear()


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ({}, {"entropy"}),
        ({"top_ratio": 1.0}, set()),
        ({"select": "random"}, set()),
        ({"score": "rsi"}, {"log_prob", "entropy"}),
        ({"score": "rsi", "select": "random"}, set()),
        ({"score": "rsi", "select": "random", "weight": "soft"}, {"log_prob", "entropy"}),
        ({"top_ratio": 1.0, "use": "clip", "score": "surprisal", "map": "dcpo"}, {"log_prob"}),
        ({"where": "advantage > 0 and draw < 1"}, {"entropy", "advantage", "draw"}),
        ({"observe": ["mismatch", "gradient_norm"]},
         {"entropy", "log_prob", "rollout_log_prob", "advantage", "sum_pi_squared"}),
        ({"score": "scores_of_a_test:good", "where": "scores_of_a_test:sure"}, {"log_prob", "entropy"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "-",
)  # fmt: skip
def test_the_fields_that_a_run_reads(values: dict[str, Any], read: set[str]) -> None:
    assert fields_read(EntropyForkConfig(**values)) == read


def test_the_scores_and_functions_of_a_run() -> None:
    own = EntropyForkConfig(
        score="scores_of_a_test:good", where="scores_of_a_test:sure", observe=["rsi", "scores_of_a_test:good"]
    )
    assert [score.name for score in scores_read(own)] == ["scores_of_a_test:good", "rsi"]
    assert own_functions(own) == (
        ("score", "scores_of_a_test:good"),
        ("where", "scores_of_a_test:sure"),
        ("observe", "scores_of_a_test:good"),
    )
    assert own_functions(EntropyForkConfig()) == ()


CALCULATED = ["actor_rollout_ref.rollout.calculate_log_probs=True"]


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"entropy_fork.score={name}"] for name in SCORES if name != "mismatch"),
        ["entropy_fork.score=mismatch", *CALCULATED],
        ["entropy_fork.score=scores_of_a_test:good", "entropy_fork.where=scores_of_a_test:sure"],
        ["entropy_fork.score=scores_of_a_test:good", "entropy_fork.entropy=current"],
        ["entropy_fork.score=scores_of_a_test:not_in_this_run", *CALCULATED],
        ["entropy_fork.where=scores_of_a_test:reference", "actor_rollout_ref.actor.use_kl_loss=True"],
        ["entropy_fork.where='draw < 0.5'"],
        ["entropy_fork.observe=[surprisal,covariance,scores_of_a_test:good]"],
        ["entropy_fork.use=clip"],
        ["entropy_fork.use=advantage", "entropy_fork.pool=batch", "actor_rollout_ref.actor.shuffle=True"],
        ["entropy_fork.use=clip", "entropy_fork.pool=response", "actor_rollout_ref.actor.shuffle=True"],
        ["entropy_fork.observe=[rsi]", "entropy_fork.pool=batch", "actor_rollout_ref.actor.shuffle=True"],
    ],
    ids=str,
)  # fmt: skip
def test_a_good_run_has_no_problem(compose: Compose, overrides: list[str]) -> None:
    config = compose("+entropy_fork=global", *overrides)
    check_maskable(config, read_config(config))


WITHOUT_LOG_PROBS = " actor_rollout_ref.rollout.calculate_log_probs=False"

REFUSED = {
    # a user's own function
    "score=no_such_module_at_all:f": "score=no_such_module_at_all:f: the module .* cannot be imported .ModuleNotFound",
    "score=broken_of_a_test:f": "cannot be imported .ModuleNotFoundError: No module named 'no_such_package_at_all'",
    "score=scores_of_a_test:no_such": "the module scores_of_a_test has no function no_such",
    "score=scores_of_a_test:not_a_function": "the module scores_of_a_test has no function not_a_function",
    "score=scores_of_a_test:no_fields": "it has no parameter. Name its parameters after fields: entropy, ",
    "score=scores_of_a_test:unknown": "no field is named entropies. Name its parameters after fields: entropy, ",
    "score=scores_of_a_test:short": r"one value per token, shape .34,., and gave shape .33,.",
    "score=scores_of_a_test:whole": "must be of a float type .* and is of torch.int64",
    "score=scores_of_a_test:broken": "it gave (nan|inf) for a token; write one that is always finite",
    "score=scores_of_a_test:raising": "it raised RuntimeError: out of ideas",
    "score=scores_of_a_test:changing": "it changes the fields that it is given; write to a copy",
    "score=scores_of_a_test:drawing": "a second call gives the same tokens other values. .* read the field 'draw'",
    "score=scores_of_a_test:by_place": "the values of a token change with the order of the responses",
    "where=scores_of_a_test:floats": "where=scores_of_a_test:floats: its tensor must be of bool",
    "where=scores_of_a_test:raising": "where=scores_of_a_test:raising: it raised RuntimeError: out of ideas",
    "where=scores_of_a_test:no_such": "where=scores_of_a_test:no_such: the module scores_of_a_test has no function",
    "observe=[surprisal,scores_of_a_test:raising]": "score=scores_of_a_test:raising: it raised RuntimeError",
    "observe=[no_such]": "observe: score must be one of entropy, .*got 'no_such'",
    # names and expressions
    "score=entropies": "score must be one of entropy, surprisal, .*got 'entropies'",
    "where='entropy >'": "it cannot be read. An expression looks like",
    "where='entropi > 1'": "there is no field 'entropi'; the fields are entropy, log_prob",
    "where='entropy.sum() > 1'": "is not allowed",
    # fields that the run does not have
    f"score=mismatch{WITHOUT_LOG_PROBS}": r"reads rollout_log_prob, which needs .*log_probs=True",
    f"score=scores_of_a_test:not_in_this_run{WITHOUT_LOG_PROBS}": "which needs .*log_probs=True",
    "where='ref_log_prob < 0'": r"reads ref_log_prob, which needs a reference policy. .*use_kl_loss=True",
    f"observe=[mismatch]{WITHOUT_LOG_PROBS}": r"score=mismatch reads rollout_log_prob, which needs",
    "score=gradient_norm actor_rollout_ref.model.use_fused_kernels=True": "sum_pi_squared, which needs an engine that",
    "score=scores_of_a_test:squares entropy_fork.entropy=current": "sum_pi_squared, which only the log-prob pass",
    # uses
    "use=clip actor_rollout_ref.actor.policy_loss.loss_mode=gspo": "use=clip is PPO's clip .*loss_mode=vanilla",
    "use=clip actor_rollout_ref.actor.shuffle=True": "use=clip is written into the batch before actor.shuffle=True",
    "use=advantage score=covariance entropy_fork.pool=response actor_rollout_ref.actor.shuffle=True":
        "use=advantage is written into the batch before actor.shuffle=True",
    "observe=[rsi] entropy_fork.entropy=current": "observe compares with what the driver keeps",
    "use=weight entropy_fork.map_slope=nan": "map_slope must be a finite number, got nan",
}  # fmt: skip


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_is_wrong_is_said_in_one_line_before_ray_starts(compose: Compose, overrides: str) -> None:
    words = [overrides] if "'" in overrides else overrides.split()
    words = [word if "." in word.partition("=")[0] else f"entropy_fork.{word}" for word in words]
    config = compose("+entropy_fork=global", *(word.replace("='", '="').replace("'", '"') for word in words))
    problems = [problem for problem in find_problems(config) if not problem.startswith("data.")]
    (problem,) = problems
    assert len(problem.splitlines()) == 1
    assert problem.startswith("entropy_fork")
    assert re.search(REFUSED[overrides], problem), problem


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score": "scores_of_a_test:many_only"}, "score=scores_of_a_test:many_only: it raised RuntimeError: too many"),
        ({"score": "scores_of_a_test:nan_of_many"}, "scores_of_a_test:nan_of_many: it gave (nan|inf) for a token"),
        ({"score": "scores_of_a_test:short_of_many"}, r"short_of_many: it must return .* and gave shape \(60,\)"),
        ({"where": "scores_of_a_test:where_many"}, "where=scores_of_a_test:where_many: it raised RuntimeError"),
        ({"observe": ["scores_of_a_test:many_only"]}, "score=scores_of_a_test:many_only: it raised RuntimeError"),
        ({"use": "weight", "score": "covariance"}, "map=linear gave a factor of -.*: below 0 it would turn the loss"),
        (
            {"use": "weight", "score": "position", "map": "exponential", "map_rate": 50.0},
            "map=exponential gave a factor of .* to inf; factors must be finite",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_only_fails_in_a_step_names_score_and_process(
    monkeypatch: pytest.MonkeyPatch, compose: Compose, values: dict[str, Any], message: str
) -> None:
    """The made-up batch of the checks has 34 tokens, a mini-batch here more than 60."""
    list(scores_read(EntropyForkConfig(**values)))
    rows = make_batch(20, num_rows=32)
    assert min(int(torch.cat(rows.masks[:16]).sum()), int(torch.cat(rows.masks[16:]).sum())) > 60
    with pytest.raises(
        EntropyForkError, match=rf"{message}.*\(in .* pid \d+ .*\)\. The step was not trained on"
    ) as error:
        run_scored(monkeypatch, rows, list(range(32)), {"top_ratio": 0.9, **values}, mini_batch_rows=16)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["surprisal", "covariance", "mismatch"])
def test_a_broken_field_in_a_step_names_score_and_process(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rows = make_batch(21, num_rows=16, eligible=1.0)
    rows.fields["log_prob"][3][0] = math.nan
    with pytest.raises(EntropyForkError, match=rf"score={name}: it gave nan for a token.*\(in .* pid \d+"):
        run_scored(monkeypatch, rows, list(range(16)), {"score": name})


def test_a_field_that_verl_did_not_write_stops_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_batch(22, num_rows=16)
    del rows.fields["rollout_log_prob"]
    with pytest.raises(EntropyForkError, match=r"score=mismatch: it reads rollout_log_prob, which this batch does not"):
        run_scored(monkeypatch, rows, list(range(16)), {"score": "mismatch"})
