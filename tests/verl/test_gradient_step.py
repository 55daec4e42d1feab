"""The mask that is made in the worker, in verl's own FSDP2 engine on 1, 2 and 4 real ranks.

A mini-batch of twelve responses is dealt out to the ranks, cut into micro-batches by verl, and trained on for one step.
The test compares the gradient before the optimizer with one that is computed here, from the paper's formula alone: one
process, one forward pass, a plain selection and PPO's clipped loss.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.mini_batch import NUM_ROWS, VOCABULARY, Answers, make_answers, make_batch, make_engine
from helpers.processes import Processes
from helpers.scored_rows import ScoredRows, chosen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.engine import keep_gradients
from entropy_fork.core.factors import changed_advantages, clip_bounds
from entropy_fork.core.rule import Rule, Selector
from entropy_fork.core.scores import SCORES
from entropy_fork.verl.config import MASKABLE_LOSSES
from entropy_fork.verl.gradient_step import FACTORS, KEPT_TOKENS, SOFT_SCORES, tally_of
from entropy_fork.verl.policy_loss import CLIP_HIGHEST, CLIP_LOWEST, CLIPPED, WEIGHED, weighed_by_driver
from entropy_fork.verl.sparse_head import AT_RESPONSES, ENTROPY_OF_MASK, EVERYWHERE, HEAD

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


# --- the plain re-statement ------------------------------------------------------------------------------------------


def forward(model: Qwen3ForCausalLM, answers: Answers) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and entropies of the response tokens, row by row."""
    log_probs, entropies = [], []
    for prompt, response in zip(answers.prompts, answers.responses, strict=True):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        everything = logits.log_softmax(-1)
        log_probs.append(everything[torch.arange(len(response)), response])
        entropies.append(-(everything.exp() * everything).sum(-1).detach())
    return log_probs, entropies


def highest(entropies: list[Tensor], masks: list[Tensor], rows: list[int], ratio: float) -> set[tuple[int, int]]:
    """The (row, position) of the ceil(ratio · n) highest entropies among the eligible tokens of some rows."""
    tokens = [(row, t) for row in rows for t in range(len(masks[row])) if masks[row][t]]
    tokens.sort(key=lambda token: -float(entropies[token[0]][token[1]]))
    return set(tokens[: math.ceil(ratio * len(tokens) - 1e-9)])


def ppo(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> Tensor:
    """PPO's clipped loss of one token, with DAPO's separate lower and upper clip."""
    ratio = (log_prob - old_log_prob).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)


def restated_gradient(
    model: Qwen3ForCausalLM, answers: Answers, kept: set[tuple[int, int]], denominator: str, mode: str
) -> dict[str, Tensor]:
    log_probs, _ = forward(model, answers)
    losses = [
        ppo(log_probs[row], answers.old_log_probs[row], answers.advantages[row])
        * (1.0 if answers.importance is None else answers.importance[row])
        for row in range(NUM_ROWS)
    ]
    eligible = {(row, t) for row in range(NUM_ROWS) for t in range(len(losses[row])) if answers.masks[row][t]}
    divisor = kept if denominator == "kept" else eligible
    total = torch.zeros(())
    for row, t in kept:
        if mode == "token-mean":
            total = total + losses[row][t] / len(divisor)
        elif mode == "seq-mean-token-mean":  # of all rows of the mini-batch, as verl counts
            total = total + losses[row][t] / len([token for token in divisor if token[0] == row]) / NUM_ROWS
        else:
            total = total + losses[row][t]
    model.zero_grad()
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- verl's engine, in the processes ---------------------------------------------------------------------------------


def build_engine(state: dict[str, Any], path: str, use_remove_padding: bool) -> str:
    """verl's FSDP2 engine for a tiny model, on packed or on padded rows. Returns its class's module."""
    engine = make_engine(path, use_remove_padding)
    keep_gradients(engine, state)
    state.update(engine=engine, use_remove_padding=use_remove_padding)
    return type(engine).__module__


def train_step(
    state: dict[str, Any], answers: Answers, rows: list[int], rule: Rule | None, cut: dict[str, Any], loss_mode: str,
    more: dict[str, list[Tensor]] | None = None, **actor: Any,
) -> dict[str, Any]:  # fmt: skip
    """One ``train_batch`` of verl's engine on some rows. Returns the gradient, and the loss's arguments row by row.

    With ``more``, fields that the driver has written, the batch has the driver's flags for them.
    """
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    from entropy_fork.verl.gradient_step import ROW_IDENTITY, RULE

    engine = state["engine"]
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_mini_batch_size=NUM_ROWS,
        ppo_micro_batch_size_per_gpu=NUM_ROWS,
        clip_ratio_low=CLIP_LOW,
        clip_ratio_high=CLIP_HIGH,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, dro_beta=0.1),
        **{"clip_ratio_c": 1e9, **actor},  # without the dual clip, which the restatement does not have
    )

    settings = {
        "temperature": 1.0,
        "global_batch_size": NUM_ROWS,
        "use_remove_padding": state["use_remove_padding"],
        **cut,
    }
    settings["calculate_entropy"] = config.entropy_coeff != 0
    if rule is not None:
        settings[RULE] = rule
    if more is not None:
        settings |= {WEIGHED: True, CLIPPED: CLIP_LOWEST in more}
    data = make_batch(answers, rows, settings, more)
    loss = weighed_by_driver(partial(ppo_loss, config=config))

    seen: dict[int, Tensor] = {}
    micro_batches: list[list[int]] = []
    outputs: list[dict[str, bool]] = []

    def noting(model_output: dict[str, Any], data: Any, dp_group: Any = None) -> Any:
        members = data[ROW_IDENTITY].values().view(-1, 2)[:, 0].tolist()
        micro_batches.append(members)
        outputs.append({name: output.requires_grad for name, output in model_output.items()})
        if "rollout_is_weights" in data:
            seen.update(zip(members, data["rollout_is_weights"].unbind(), strict=True))
        return loss(model_output=model_output, data=data, dp_group=dp_group)

    torch.manual_seed(0)  # clip_cov clips random tokens
    with engine.train_mode():
        output = engine.train_batch(data, loss_function=noting)
    return {
        "gradients": state["gradients"],
        "weights": seen,
        "micro_batches": micro_batches,
        "metrics": output["metrics"],
        "outputs": outputs,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen3ForCausalLM, str]:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, initializer_range=0.4, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return model, str(path)


@pytest.fixture(scope="module")
def worlds(model: tuple[Qwen3ForCausalLM, str]) -> Iterator[dict[int, Processes]]:
    worlds = {size: Processes(size) for size in (1, 2, 4)}
    for size, world in worlds.items():
        modules = world(build_engine, [(model[1], size == 2)] * size)
        assert set(modules) == {"entropy_fork.verl.engine"}
    yield worlds
    for world in worlds.values():
        world.close()


def train(
    world: Processes, answers: Answers, rule: Rule | None, cut: dict[str, Any], deal: list[int] | None = None,
    loss_mode: str = "entropy_fork/vanilla", **actor: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    deal = list(range(NUM_ROWS)) if deal is None else deal
    share = NUM_ROWS // world.size
    if rule is not None:
        actor["loss_agg_mode"] = rule.loss_agg_mode
    parts = [deal[rank * share : (rank + 1) * share] for rank in range(world.size)]
    return world(partial(train_step, **actor), [(answers, part, rule, cut, loss_mode) for part in parts])


def kept_of(answer: list[dict[str, Any]]) -> set[tuple[int, int]]:
    """The (row, position) of the tokens that reached the loss with a weight."""
    weights = {row: values for part in answer for row, values in part["weights"].items()}
    return {(row, t) for row in weights for t in range(len(weights[row])) if weights[row][t] != 0}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


CUTS = st.sampled_from(
    [{"use_dynamic_bsz": False, "micro_batch_size_per_gpu": size} for size in (1, 3)]
    + [{"use_dynamic_bsz": True, "max_token_len_per_gpu": tokens} for tokens in (20, 45, 1000)]
)


@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 2, 4]),
    cut=CUTS,
    ratio=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    entropy=st.sampled_from(["old", "current"]),
    denominator=st.sampled_from(["kept", "all"]),
    mode=st.sampled_from(["token-mean", "seq-mean-token-mean", "token-sum"]),
    importance=st.booleans(),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=40)
def test_pool_mini_batch_is_the_formula_on_any_ranks_and_micro_batches(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], seed: int, size: int, cut: dict[str, Any],
    ratio: float, entropy: str, denominator: str, mode: str, importance: bool, shuffle: Any,
) -> None:  # fmt: skip
    """Eq. 6 with one τ for the whole mini-batch, cut in any way, with entropies of either policy."""
    answers = make_answers(seed, importance)
    entropies = forward(model[0], answers)[1] if entropy == "current" else answers.old_entropy
    kept = highest(entropies, answers.masks, list(range(NUM_ROWS)), ratio)
    deal = list(range(NUM_ROWS))
    shuffle.shuffle(deal)
    rule = Rule(Selector(ratio), entropy, "mini_batch", mode, denominator)
    answer = train(worlds[size], answers, rule, cut, deal)
    assert kept_of(answer) == kept
    for part in answer:
        close(part["gradients"], restated_gradient(model[0], answers, kept, denominator, mode))


@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 2, 4]),
    cut=CUTS,
    ratio=st.sampled_from([0.05, 0.2, 0.5]),
    denominator=st.sampled_from(["kept", "all"]),
    mode=st.sampled_from(["token-mean", "seq-mean-token-mean", "token-sum"]),
)
@settings(max_examples=25)
def test_official_keeps_the_top_of_each_micro_batch(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], seed: int, size: int, cut: dict[str, Any],
    ratio: float, denominator: str, mode: str,
) -> None:  # fmt: skip
    """The authors' algorithm keeps, in each micro-batch of each rank, the ceil(ρ n) highest current entropies.

    Our denominator counts the tokens of all micro-batches. The authors' code averages the means of micro-batches.
    """
    answers = make_answers(seed)
    answer = train(worlds[size], answers, Rule(Selector(ratio), "current", "micro_batch", mode, denominator), cut)
    _, entropies = forward(model[0], answers)
    micro_batches = [members for part in answer for members in part["micro_batches"]]
    assert sorted(row for members in micro_batches for row in members) == list(range(NUM_ROWS))
    kept = set().union(*(highest(entropies, answers.masks, members, ratio) for members in micro_batches))
    assert kept_of(answer) == kept
    for part in answer:
        close(part["gradients"], restated_gradient(model[0], answers, kept, denominator, mode))


@pytest.mark.parametrize(("size", "per_micro_batch"), [(1, 12), (1, 4), (2, 3), (4, 1)])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_official_is_the_authors_update(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], size: int, per_micro_batch: int, ratio: float
) -> None:
    """The authors' mean over a micro-batch's kept tokens, then over micro-batches and ranks, gives the same update.

    All responses have one length here, so a mean of means is the mean over all kept tokens.
    """
    answers = make_answers(seed=7)
    for name in ("responses", "old_log_probs", "old_entropy", "advantages"):
        setattr(
            answers,
            name,
            [values[:1].repeat(8) if len(values) < 8 else values[:8] for values in getattr(answers, name)],
        )
    answers.masks = [torch.ones(8, dtype=torch.int64)] * NUM_ROWS
    cut = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": per_micro_batch}
    answer = train(worlds[size], answers, Rule(Selector(ratio), "current", "micro_batch"), cut)

    plain = model[0]
    plain.zero_grad()
    kept = set()
    share = NUM_ROWS // size
    for rank in range(size):
        rows_of_rank = list(range(rank * share, (rank + 1) * share))
        accumulation = share // per_micro_batch
        for start in range(0, share, per_micro_batch):
            rows = rows_of_rank[start : start + per_micro_batch]
            log_probs, entropies = forward(plain, answers)
            tokens = highest(entropies, answers.masks, rows, ratio)
            losses = [ppo(log_probs[r][t], answers.old_log_probs[r][t], answers.advantages[r][t]) for r, t in tokens]
            (torch.stack(losses).mean() / accumulation / size).backward()
            kept |= tokens
    assert kept_of(answer) == kept
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    for part in answer:
        close(part["gradients"], expected)


ONE_BY_ONE = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1}
THREE = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 3}
PACKED = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 45}
#: an order of the rows in which ``actor.shuffle`` could deal them out
SHUFFLED = [7, 2, 9, 0, 11, 4, 3, 8, 1, 10, 5, 6]


@pytest.mark.parametrize("entropy", ["old", "current"])
@pytest.mark.parametrize("pool", ["response", "micro_batch"])
@pytest.mark.parametrize("selector", [Selector(0.3), Selector(0.6, "bottom"), Selector(0.3, ties="threshold")])
def test_the_other_pools_and_selectors(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], entropy: str, pool: str, selector: Selector
) -> None:
    answers = make_answers(seed=11)
    answer = train(worlds[2], answers, Rule(selector, entropy, pool), PACKED)
    entropies = forward(model[0], answers)[1] if entropy == "current" else answers.old_entropy
    if selector.select == "bottom":
        entropies = [-values for values in entropies]
    pools = [members for part in answer for members in part["micro_batches"]]
    if pool == "response":
        pools = [[row] for row in range(NUM_ROWS)]
    kept = set().union(*(highest(entropies, answers.masks, members, selector.top_ratio) for members in pools))
    assert kept_of(answer) == kept
    for part in answer:
        close(part["gradients"], restated_gradient(model[0], answers, kept, "kept", "token-mean"))


def test_soft_weights_of_the_current_policy(worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str]) -> None:
    """They are in proportion to the entropy, with a mean of 1 over all ranks, times the denominator's factor."""
    answers = make_answers(seed=2)
    for pool in ("micro_batch", "mini_batch"):
        answer = train(
            worlds[2], answers, Rule(Selector(0.4), "current", pool, denominator="all", weight="soft"), THREE
        )
        kept = kept_of(answer)
        _, entropies = forward(model[0], answers)
        mean = sum(float(entropies[row][t]) for row, t in kept) / len(kept)
        weights = {row: values for part in answer for row, values in part["weights"].items()}
        for row, t in kept:
            assert float(weights[row][t]) == pytest.approx(float(entropies[row][t]) / mean, rel=1e-4)


@pytest.mark.parametrize("loss_mode", MASKABLE_LOSSES)
@pytest.mark.parametrize("pool", ["micro_batch", "mini_batch"])
def test_every_loss_of_verl(worlds: dict[int, Processes], loss_mode: str, pool: str) -> None:
    """verl's own loss, with our weights passed as importance weights, has the gradient of the masked loss."""
    answers = make_answers(seed=3)
    masked = train(
        worlds[2], answers, Rule(Selector(0.3), "current", pool), THREE, loss_mode=f"entropy_fork/{loss_mode}"
    )
    weights = {row: values for part in masked for row, values in part["weights"].items()}
    given = replace(answers, importance=[weights[row] for row in range(NUM_ROWS)])
    plain = train(worlds[2], given, None, THREE, loss_mode=loss_mode)
    assert 0 < len(kept_of(masked)) < sum(int(mask.sum()) for mask in answers.masks)
    for name, gradient in plain[0]["gradients"].items():
        assert torch.equal(masked[0]["gradients"][name], gradient), name
    assert any(gradient.abs().sum() > 0 for gradient in plain[0]["gradients"].values())


@pytest.mark.parametrize("pool", ["response", "micro_batch", "mini_batch"])
@pytest.mark.parametrize("cut", [ONE_BY_ONE, PACKED])
def test_everything_kept_is_the_plain_update_bit_for_bit(
    worlds: dict[int, Processes], pool: str, cut: dict[str, Any]
) -> None:
    answers = make_answers(seed=4)
    for entropy in ("old", "current"):
        masked = train(worlds[2], answers, Rule(Selector(1.0), entropy, pool), cut)
        plain = train(worlds[2], answers, None, cut, loss_mode="vanilla")
        for name, gradient in plain[0]["gradients"].items():
            assert torch.equal(masked[0]["gradients"][name], gradient), name


@pytest.mark.parametrize(("entropy", "pool"), [("old", "mini_batch"), ("current", "micro_batch")])
def test_rejected_tokens_stay_in_verls_divisor(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], entropy: str, pool: str
) -> None:
    """The loss is the mean over the kept tokens times the share not rejected; with ρ = 1.0 it is the plain one."""
    answers = make_answers(seed=9)
    before = answers.masks
    masks = [mask.clone() for mask in before]
    for row in (0, 4, 7):
        masks[row][1:] = 0
    answers = replace(answers, masks=masks, masks_before=before)
    share = sum(int(mask.sum()) for mask in masks) / sum(int(mask.sum()) for mask in before)
    assert share < 0.9

    answer = train(worlds[2], answers, Rule(Selector(0.3), entropy, pool), PACKED)
    expected = restated_gradient(model[0], answers, kept_of(answer), "kept", "token-mean")
    close(answer[0]["gradients"], {name: gradient * share for name, gradient in expected.items()})

    everything = train(worlds[2], answers, Rule(Selector(1.0), entropy, pool), PACKED)
    plain = train(worlds[2], answers, None, PACKED, loss_mode="vanilla")
    for name, gradient in plain[0]["gradients"].items():
        assert torch.equal(everything[0]["gradients"][name], gradient), name


@pytest.mark.parametrize("pool", ["micro_batch", "mini_batch"])
def test_entropy_bonus_and_kl_loss_are_those_of_all_tokens(worlds: dict[int, Processes], pool: str) -> None:
    """The two terms add the same gradient with and without the mask."""
    answers = make_answers(seed=5)
    terms = {"entropy_coeff": 0.3, "use_kl_loss": True, "kl_loss_coef": 0.7, "kl_loss_type": "k3"}
    rule = Rule(Selector(0.2), "current", pool)
    added = []
    for masked in (True, False):
        arguments = (rule, THREE) if masked else (None, THREE)
        loss_mode = "entropy_fork/vanilla" if masked else "vanilla"
        with_terms, without = (
            train(worlds[2], answers, *arguments, loss_mode=loss_mode, **actor) for actor in (terms, {})
        )
        added.append({n: with_terms[0]["gradients"][n] - g for n, g in without[0]["gradients"].items()})
    close(added[0], added[1])
    assert any(gradient.abs().sum() > 0 for gradient in added[1].values())


def graphs_of_entropies(state: dict[str, Any], answers: Answers, rows: list[int], **actor: Any) -> list[bool]:
    """Whether the entropies for a mask in the loss have a gradient graph."""
    seen: list[bool] = []
    prepare = state["engine"].prepare_model_outputs

    def noting(**arguments: Any) -> Any:
        model_output = prepare(**arguments)
        seen.append(model_output[ENTROPY_OF_MASK].requires_grad)
        return model_output

    state["engine"].prepare_model_outputs = noting
    try:
        rule = Rule(Selector(0.2), "current", "micro_batch")
        train_step(state, answers, rows, rule, THREE, "entropy_fork/vanilla", **actor)
    finally:
        del state["engine"].prepare_model_outputs
    return seen


@pytest.mark.parametrize("size", [1, 2])  # with packed rows and with padded rows
def test_no_graph_of_entropies_that_only_the_mask_looks_at(worlds: dict[int, Processes], size: int) -> None:
    """A graph would be as large as the logits, and verl would report these entropies as its own."""
    rule, world = Rule(Selector(0.2), "current", "micro_batch"), worlds[size]
    share = NUM_ROWS // size
    parts = [(make_answers(6), list(range(rank * share, (rank + 1) * share))) for rank in range(size)]
    for actor in ({}, {"entropy_coeff": 0.1}):
        for seen in world(partial(graphs_of_entropies, **actor), parts):
            assert seen == [False] * (4 // size)
    for part in train(world, make_answers(6), rule, THREE):
        assert part["outputs"] == [{"log_probs": True}] * (4 // size)
        assert "actor/entropy_loss" not in part["metrics"]
    for part in train(world, make_answers(6), rule, THREE, entropy_coeff=0.1):
        assert part["outputs"] == [{"log_probs": True, "entropy": True}] * (4 // size)
        assert "actor/entropy_loss" in part["metrics"]
    # the engine is as before, and the pass before the step keeps no graph either
    for plain in (None, Rule(Selector(0.2), "current")):
        mode = "vanilla" if plain is None else "entropy_fork/vanilla"
        for part in train(world, make_answers(6), plain, THREE, loss_mode=mode):
            assert part["outputs"] == [{"log_probs": True}] * (4 // size)


# --- the pass without gradients --------------------------------------------------------------------------------------


def step_after_a_pass(state: dict[str, Any], path: str, answers: Answers, offload: bool) -> dict[str, Any]:
    """A step with current entropies of the mini-batch. Returns the engine's modes in the pass, the update, an error."""
    from unittest.mock import patch

    from verl.utils.activation_offload import SynchronizedGroupOffloadHandler

    from entropy_fork.verl.gradient_step import _without_training

    modes: list[tuple[str, set[bool]]] = []
    engine = make_engine(path, use_remove_padding=True, enable_activation_offload=offload)
    keep_gradients(engine, state)
    state.update(engine=engine, use_remove_padding=True)
    forward_backward_batch = engine.forward_backward_batch

    def note() -> None:
        modes.append((engine.mode, {module.training for module in engine.module.modules()}))

    def noting(*arguments: Any, **keywords: Any) -> Any:
        note()
        return forward_backward_batch(*arguments, **keywords)

    engine.forward_backward_batch = noting
    unpinned = partial(SynchronizedGroupOffloadHandler.offload, pin_memory=False)  # which needs an accelerator
    with patch.object(SynchronizedGroupOffloadHandler, "offload", staticmethod(unpinned)):
        rule, rows = Rule(Selector(0.3), "current", "mini_batch"), list(range(NUM_ROWS))
        answer = train_step(state, answers, rows, rule, THREE, "entropy_fork/vanilla")
    with engine.train_mode():
        with pytest.raises(ZeroDivisionError), _without_training(engine):
            raise ZeroDivisionError
        note()
    return answer | {"modes": modes}


@pytest.fixture(scope="module")
def dropping_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen3ForCausalLM, str]:
    """A model of three layers, the smallest number for which verl offloads activations."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, initializer_range=0.4, tie_word_embeddings=True,
        attention_dropout=0.5,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("dropping_out")
    model.save_pretrained(path)
    return model, str(path)


@pytest.mark.process
@pytest.mark.parametrize("offload", [False, True])
def test_the_pass_before_a_step_runs_as_verl_runs_a_pass(
    dropping_out: tuple[Qwen3ForCausalLM, str], offload: bool
) -> None:
    """Dropout is off, so the mask uses the model's own entropies. Activations are offloaded only in the update."""
    model, path = dropping_out
    answers = make_answers(seed=21)
    world = Processes(1)
    try:
        (answer,) = world(step_after_a_pass, [(path, answers, offload)])
    finally:
        world.close()
    assert answer["modes"] == [("eval", {False}), ("train", {True}), ("train", {True})]
    assert kept_of([answer]) == highest(forward(model, answers)[1], answers.masks, list(range(NUM_ROWS)), 0.3)
    assert all(bool(gradient.isfinite().all()) for gradient in answer["gradients"].values())


# --- the old policy's entropies and the current one's ----------------------------------------------------------------


def overlap(state: dict[str, Any], path: str, answers: Answers, how: dict[str, Any], rule: Rule, head: str) -> float:
    """``overlap_with_old`` of a step, if a log-prob pass with the same weights computed the old entropies."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import response_from_nested

    from entropy_fork.verl.gradient_step import RULE

    key = ("engine", str(how))
    if key not in state:
        state[key] = make_engine(path, **how)
        keep_gradients(state[key], state)
    engine = state[key]
    settings = {
        "temperature": 0.6, "global_batch_size": NUM_ROWS, "use_remove_padding": how["use_remove_padding"],
        "use_fused_kernels": how.get("use_fused_kernels", False),
        "calculate_entropy": True, "compute_loss": False, "use_dynamic_bsz": True, "max_token_len_per_gpu": 60,
    }  # fmt: skip
    everything = list(range(NUM_ROWS))
    passed = make_batch(answers, everything, {**settings, HEAD: head})
    with engine.eval_mode():
        output = engine.infer_batch(passed)["model_output"]
    old = response_from_nested(output["entropy"], passed["response_mask"])
    data = make_batch(
        replace(answers, old_entropy=list(old.unbind())), everything, {**settings, HEAD: EVERYWHERE, RULE: rule}
    )
    tu.assign_non_tensor(data, calculate_entropy=False, compute_loss=True)

    def loss(model_output: dict[str, Any], data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
        return model_output["log_probs"].values().sum(), {}

    with engine.train_mode():
        metrics = engine.train_batch(data, loss)["metrics"]
    ours = {name: values[0] for name, values in metrics.items() if name.startswith("entropy_fork/")}
    return tally_of(ours, num_mini_batches=1).metrics()["overlap_with_old"]


FUSED = {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}}


@pytest.mark.parametrize("param_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("packing", ["packed", "padded", "packed, fused"])
def test_with_unchanged_weights_the_current_mask_is_the_old_one(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], packing: str, param_dtype: str
) -> None:
    """``overlap_with_old`` is exactly 1, with any head for the old entropies, and any place where the mask is made."""
    how = {"use_remove_padding": packing != "padded", "param_dtype": param_dtype}
    world = worlds[1]
    if "fused" in packing:  # verl's fused kernels replace the forward pass of the model's class
        how, world = how | FUSED, Processes(1)
    cases = itertools.product((0, 1), ("micro_batch", "mini_batch"), (AT_RESPONSES, EVERYWHERE))
    try:
        for seed, pool, head in cases:
            rule = Rule(Selector(0.2), "current", pool)
            (found,) = world(overlap, [(model[1], make_answers(seed), how, rule, head)])
            assert found == 1.0, (seed, pool, head)
    finally:
        if world is not worlds[1]:
            world.close()


def test_what_the_step_reports(worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str]) -> None:
    """Both ranks report the same numbers, of the whole mini-batch. verl averages them, then they become a tally."""
    answers = make_answers(seed=8)
    reports = train(worlds[2], answers, Rule(Selector(0.3), "current"), THREE)
    ours = [{k: v for k, v in part["metrics"].items() if k.startswith("entropy_fork/")} for part in reports]
    selection = {k: v for k, v in ours[0].items() if "loss_" not in k}
    assert selection == {k: v for k, v in ours[1].items() if "loss_" not in k}
    metrics = tally_of({name: values[0] for name, values in selection.items()}, num_mini_batches=3).metrics()

    _, entropies = forward(model[0], answers)
    everything = list(range(NUM_ROWS))
    kept = highest(entropies, answers.masks, everything, 0.3)
    by_old = highest(answers.old_entropy, answers.masks, everything, 0.3)
    eligible = {(row, t) for row in everything for t in range(len(answers.masks[row])) if answers.masks[row][t]}
    positive = {token for token in eligible if answers.advantages[token[0]][0] > 0}
    threshold = min(float(entropies[row][t]) for row, t in kept)
    responses = {row for row, _ in eligible}
    for name, expected in {
        "kept_tokens": 3 * len(kept),
        "kept_ratio": len(kept) / len(eligible),
        "pool_tokens": len(eligible),
        "threshold": threshold,
        "threshold_min": threshold,
        "threshold_max": threshold,
        "entropy_kept": sum(float(entropies[row][t]) for row, t in kept) / len(kept),
        "kept_ratio_positive": len(kept & positive) / len(positive),
        "kept_ratio_negative": len(kept - positive) / len(eligible - positive),
        "responses_without_kept": len(responses - {row for row, _ in kept}) / len(responses),
        "overlap_with_old": len(kept & by_old) / len(kept),
    }.items():
        assert metrics[name] == pytest.approx(expected, rel=1e-5), name


def test_importance_weights_do_not_pass_for_a_mask(worlds: dict[int, Processes]) -> None:
    """If the rule is lost on the way, but rollout correction wrote weights, the loss of a masked run still refuses."""
    answers = make_answers(9, importance=True)
    with pytest.raises(RuntimeError, match=r"no token weights reached the policy loss in .* pid \d+"):
        train(worlds[2], answers, None, THREE)


def cut_otherwise(state: dict[str, Any], answers: Answers, rows: list[int]) -> None:
    from entropy_fork.verl import gradient_step

    original = gradient_step._cut
    gradient_step._cut = lambda *arguments: original(*arguments)[::-1]
    try:
        train_step(state, answers, rows, Rule(Selector(0.2), "current", "micro_batch"), THREE, "entropy_fork/vanilla")
    finally:
        gradient_step._cut = original


def test_micro_batches_that_were_not_counted_stop_the_run(worlds: dict[int, Processes]) -> None:
    """The run stops if verl cuts a mini-batch in another way than the function of verl's that we call."""
    with pytest.raises(RuntimeError, match="verl cut the mini-batch into other micro-batches than were counted"):
        worlds[1](cut_otherwise, [(make_answers(10), list(range(NUM_ROWS)))])


# --- weights, advantages and clip ranges by token ---------------------------------------------------------------------


def restated_factors(answers: Answers, ratio: float, offset: float, slope: float) -> dict[tuple[int, int], float]:
    """offset + slope·s of the tokens with the highest surprisal s of the mini-batch."""
    surprisals = [-values for values in answers.old_log_probs]
    kept = highest(surprisals, answers.masks, list(range(NUM_ROWS)), ratio)
    return {(row, t): offset + slope * float(surprisals[row][t]) for row, t in kept}


def restated_use(
    model: Qwen3ForCausalLM, answers: Answers, factors: dict[tuple[int, int], float], use: str, dual: float = 1e9
) -> dict[str, Tensor]:
    """The gradient of PPO's loss, averaged over all tokens, where a factor changes one number of each token."""
    log_probs, _ = forward(model, answers)
    eligible = [(row, t) for row in range(NUM_ROWS) for t in range(len(answers.masks[row])) if answers.masks[row][t]]
    total = torch.zeros(())
    for row, t in eligible:
        factor = factors.get((row, t))
        advantage, low, high, weight = float(answers.advantages[row][t]), CLIP_LOW, CLIP_HIGH, 1.0
        if factor is not None and use == "weight":
            weight = factor
        elif factor is not None and use == "multiply":
            advantage *= factor
        elif factor is not None and use == "add":
            advantage += min(factor, abs(advantage) / 2)
        elif factor is not None:
            low, high = low * factor, high * factor
        ratio = (log_probs[row][t] - answers.old_log_probs[row][t]).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        if advantage < 0:
            gain = torch.max(gain, torch.tensor(dual * advantage))
        total = total - weight * gain / len(eligible)
    model.zero_grad()
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def near(model: Qwen3ForCausalLM, seed: int) -> Answers:
    """Answers whose old policy is so near to the model that PPO clips some of their ratios, and others not."""
    answers = make_answers(seed)
    random = torch.Generator().manual_seed(seed)
    new = [values.detach() for values in forward(model, answers)[0]]
    answers.old_log_probs = [values - 0.3 * torch.randn(len(values), generator=random) for values in new]
    return answers


def on_ranks(
    world: Processes, answers: Answers, more: dict[str, list[Tensor]], loss_mode: str = "entropy_fork/vanilla",
    **actor: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """A step of a batch that the driver has weighed, with its rows in another order."""
    share = NUM_ROWS // world.size
    parts = [SHUFFLED[rank * share : (rank + 1) * share] for rank in range(world.size)]
    step = partial(train_step, more=more or None, loss_agg_mode="token-mean", **actor)
    return world(step, [(answers, part, None, PACKED, loss_mode) for part in parts])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("entropy", ["old", "current"])
@pytest.mark.parametrize("normalize", ["pool", "none"])
def test_the_gradient_of_weighted_tokens(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], size: int, entropy: str, normalize: str
) -> None:
    """``use=weight``: a kept token weighs by its factor, another one 1."""
    answers = make_answers(41)
    if entropy == "current":
        given_answers = replace(answers, old_log_probs=[values.detach() for values in forward(model[0], answers)[0]])
    else:
        given_answers = answers
    factors = restated_factors(given_answers, 0.4, 0.5, 0.25)
    if normalize == "pool":
        mean = sum(factors.values()) / len(factors)
        factors = {token: factor / mean for token, factor in factors.items()}
    rule = Rule.of(
        score="surprisal", top_ratio=0.4, use="weight", map_offset=0.5, map_slope=0.25, entropy=entropy,
        normalize=normalize,
    )  # fmt: skip
    for part in train(worlds[size], answers, rule, PACKED, SHUFFLED):
        close(part["gradients"], restated_use(model[0], answers, factors, "weight"))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("combine", ["multiply", "add"])
def test_the_gradient_of_changed_advantages(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], size: int, combine: str
) -> None:
    """``use=advantage``: the driver writes the advantages, and the worker trains with them."""
    answers = make_answers(42)
    rule = Rule.of(
        score="surprisal", top_ratio=0.4, use="advantage", combine=combine, map_offset=0.5, map_slope=0.1
    )  # fmt: skip
    choice, weights = chosen(scored_rows(answers), rule)
    changed = changed_advantages(torch.cat(answers.advantages), choice.factors, rule)
    more = {"advantages": list(changed.split([len(mask) for mask in answers.masks])), "rollout_is_weights": weights}
    expected = restated_use(model[0], answers, restated_factors(answers, 0.4, 0.5, 0.1), combine)
    for part in on_ranks(worlds[size], answers, more):
        close(part["gradients"], expected)


def bounds_of(answers: Answers, rule: Rule) -> dict[str, list[Tensor]]:
    """What the driver writes for ``use=clip``."""
    choice, weights = chosen(scored_rows(answers), rule)
    bounds = clip_bounds(choice.factors, choice.score, rule, CLIP_LOW, CLIP_HIGH)
    lengths = [len(mask) for mask in answers.masks]
    lowest, highest = (list(bound.split(lengths)) for bound in bounds)
    return {CLIP_LOWEST: lowest, CLIP_HIGHEST: highest, "rollout_is_weights": weights}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dual", [1e9, 1.15])
def test_the_gradient_of_clip_ranges_by_token(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], size: int, dual: float
) -> None:
    """``use=clip``: each token has its own range; the second clip, of negative advantages, stays verl's."""
    answers = near(model[0], 43)
    rule = Rule.of(score="surprisal", top_ratio=0.4, use="clip", map_offset=0.25, map_slope=0.3)
    factors = restated_factors(answers, 0.4, 0.25, 0.3)
    expected = restated_use(model[0], answers, factors, "clip", dual)
    plain = restated_use(model[0], answers, {}, "clip", dual)
    assert any(not torch.allclose(gradient, plain[name]) for name, gradient in expected.items())
    for part in on_ranks(worlds[size], answers, bounds_of(answers, rule), clip_ratio_c=dual):
        close(part["gradients"], expected)


@pytest.mark.parametrize("dual", [1e9, 1.15])
def test_equal_clip_ranges_are_verls_update_bit_for_bit(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], dual: float
) -> None:
    answers = near(model[0], 44)
    rule = Rule.of(use="clip", map_offset=1.0, map_slope=0.0, top_ratio=0.5)
    ours = on_ranks(worlds[2], answers, bounds_of(answers, rule), clip_ratio_c=dual)
    verls = on_ranks(worlds[2], answers, {}, loss_mode="vanilla", clip_ratio_c=dual)
    for our, their in zip(ours, verls, strict=True):
        for name, gradient in their["gradients"].items():
            assert torch.equal(our["gradients"][name], gradient), name
        for name, value in their["metrics"].items():
            assert getattr(our["metrics"][name], "values", our["metrics"][name]) == getattr(value, "values", value), (
                name
            )
    clipped = {name: max(verls[0]["metrics"][f"actor/{name}"].values) for name in ("pg_clipfrac", "pg_clipfrac_lower")}
    assert clipped["pg_clipfrac"] > 0
    assert (clipped["pg_clipfrac_lower"] > 0) is (dual < 2)


def test_clip_ranges_that_are_lost_on_the_way_stop_the_run(worlds: dict[int, Processes]) -> None:
    answers = make_answers(45)
    bounds = bounds_of(answers, Rule.of(use="clip", top_ratio=0.5))
    del bounds[CLIP_HIGHEST]
    with pytest.raises(RuntimeError, match=r"use=clip was asked for, but the batch has no clip ranges in .* pid \d+"):
        on_ranks(worlds[2], answers, bounds)


# --- any score -------------------------------------------------------------------------------------------------------


def scored_rows(
    answers: Answers, log_probs: list[Tensor] | None = None, entropies: list[Tensor] | None = None
) -> ScoredRows:
    """The answers as scores see them, with the old policy's fields or others."""
    fields = {
        "entropy": answers.old_entropy if entropies is None else entropies,
        "log_prob": answers.old_log_probs if log_probs is None else [values.detach() for values in log_probs],
        "advantage": answers.advantages,
        "ref_log_prob": answers.old_log_probs,
    }
    if answers.rollout_log_probs is not None and answers.sum_pi_squared is not None:
        fields |= {"rollout_log_prob": answers.rollout_log_probs, "sum_pi_squared": answers.sum_pi_squared}
    rows = list(range(NUM_ROWS))
    return ScoredRows(fields, answers.masks, rows, [1000 + row for row in rows])


def weights_of_step(
    state: dict[str, Any], answers: Answers, rows: list[int], rule: Rule, cut: dict[str, Any],
    more: dict[str, list[Tensor]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The token weights before a gradient step, without the step."""
    from entropy_fork.verl.gradient_step import GradientStep

    settings = {
        "temperature": 1.0, "global_batch_size": NUM_ROWS, "use_remove_padding": state["use_remove_padding"], **cut
    }  # fmt: skip
    data = make_batch(answers, rows, settings, more)
    with state["engine"].train_mode():
        step = GradientStep(state["engine"], data, rule, None)
    return {
        "weights": dict(zip(rows, data["rollout_is_weights"].unbind(), strict=True)),
        "micro_batches": [[rows[place] for place in members] for members in step._micro_batches],
        "metrics": step.metrics(),
    }


def weights_in(
    world: Processes, answers: Answers, rule: Rule, cut: dict[str, Any], deal: list[int], more: Any = None
) -> tuple[dict[int, Tensor], Tensor, list[dict[str, Any]]]:
    """The weights of each row, the micro-batch of each row, and the metrics of each rank."""
    share = NUM_ROWS // world.size
    parts = [deal[rank * share : (rank + 1) * share] for rank in range(world.size)]
    found = world(weights_of_step, [(answers, part, rule, cut, more) for part in parts])
    micro_batch = torch.zeros(NUM_ROWS, dtype=torch.int64)
    for number, members in enumerate(members for part in found for members in part["micro_batches"]):
        micro_batch[members] = number
    weights = {row: values for part in found for row, values in part["weights"].items()}
    return weights, micro_batch, [part["metrics"] for part in found]


#: every use that a worker can make, see ``tests/verl/test_scores_on_driver.py`` for the others
USES_IN_WORKER: dict[str, dict[str, Any]] = {
    "mask": {"use": "mask"},
    "weight": {"use": "weight", "map": "rank", "map_low": 0.25},
}


@pytest.mark.parametrize("control", ["none", "matched_random"])
@pytest.mark.parametrize("use", USES_IN_WORKER)
@pytest.mark.parametrize("name", SCORES)
def test_every_score_gives_the_same_weights_on_any_ranks(
    worlds: dict[int, Processes], name: str, use: str, control: str
) -> None:
    """As with ``actor.shuffle``: the rows in another order, on 1, 2 and 4 ranks; each pool that a worker can have."""
    answers = make_answers(31, every_field=True)
    where = "advantage > -0.5 and draw < 0.9" if list(SCORES).index(name) % 2 else ""
    for pool, sizes in {"mini_batch": (1, 2, 4), "micro_batch": (2,), "response": (4,)}.items():
        rule = Rule.of(score=name, pool=pool, control=control, top_ratio=0.4, where=where, **USES_IN_WORKER[use])
        for size in sizes:
            weights, micro_batch, metrics = weights_in(worlds[size], answers, rule, THREE, SHUFFLED)
            choice, expected = chosen(scored_rows(answers), rule, micro_batch)
            for row in range(NUM_ROWS):
                assert torch.equal(weights[row], expected[row]), (pool, size, row)
            assert all(rank == metrics[0] for rank in metrics)
            counted = tally_of({key: values[0] for key, values in metrics[0].items()}, 1).metrics()
            assert counted["kept_tokens"] == int(choice.kept.sum())


@pytest.mark.parametrize("use", USES_IN_WORKER)
@pytest.mark.parametrize("name", [name for name in SCORES if name not in ("position", "random", "gradient_norm")])
def test_scores_of_the_current_policy(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], name: str, use: str
) -> None:
    """Entropies and log-probabilities are those of the model, from a pass without gradients."""
    answers = make_answers(32, every_field=True)
    log_probs, entropies = forward(model[0], answers)
    rule = Rule.of(score=name, entropy="current", top_ratio=0.4, where="entropy > 0.2", **USES_IN_WORKER[use])
    choice, expected = chosen(scored_rows(answers, log_probs, entropies), rule)
    old = chosen(scored_rows(answers), replace(rule, entropy="old"))[0]
    assert not torch.equal(choice.kept, old.kept)
    for size in (2, 4):
        weights, _, metrics = weights_in(worlds[size], answers, rule, THREE, SHUFFLED)
        for row in range(NUM_ROWS):
            torch.testing.assert_close(weights[row], expected[row], rtol=1e-4, atol=1e-4)
        counted = tally_of({key: values[0] for key, values in metrics[0].items()}, 1).metrics()
        both = int((choice.kept & old.kept).sum())
        assert counted["overlap_with_old"] == pytest.approx(both / int(choice.kept.sum()))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "name", [n for n, score in SCORES.items() if score.elementwise and n not in ("position", "random", "gradient_norm")]
)
def test_scores_that_the_loss_sees(
    worlds: dict[int, Processes], model: tuple[Qwen3ForCausalLM, str], name: str, size: int
) -> None:
    """``official`` with another score: in each micro-batch, without a pass of its own; also as a control."""
    answers = make_answers(33, every_field=True)
    log_probs, entropies = forward(model[0], answers)
    for control in ("none", "matched_random"):
        rule = Rule.of(score=name, entropy="current", pool="micro_batch", top_ratio=0.4, control=control)
        assert rule.selected_in_loss
        answer = train(worlds[size], answers, rule, THREE)
        micro_batch = torch.zeros(NUM_ROWS, dtype=torch.int64)
        for number, members in enumerate(members for part in answer for members in part["micro_batches"]):
            micro_batch[members] = number
        choice, _ = chosen(scored_rows(answers, log_probs, entropies), rule, micro_batch)
        by_row = choice.kept.split([len(mask) for mask in answers.masks])
        kept = {(row, place) for row in range(NUM_ROWS) for place in by_row[row].nonzero().flatten().tolist()}
        assert kept_of(answer) == kept
        for part in answer:
            close(part["gradients"], restated_gradient(model[0], answers, kept, "kept", "token-mean"))


@pytest.mark.parametrize(
    "values", [{"weight": "soft"}, {"weight": "soft", "control": "matched_random"}, {"use": "weight", "map": "rank"}]
)
@pytest.mark.parametrize("name", ["surprisal", "covariance"])
def test_what_the_driver_selected_is_weighed_in_the_worker(
    worlds: dict[int, Processes], name: str, values: dict[str, Any]
) -> None:
    """``pool=batch`` with ``actor.shuffle``: the driver sends what it kept, and what a kept token weighs by."""
    answers = make_answers(34, every_field=True)
    rule = Rule.of(score=name, pool="batch", top_ratio=0.4, **values)
    choice, expected = chosen(scored_rows(answers), rule)
    lengths = [len(mask) for mask in answers.masks]
    more = {KEPT_TOKENS: list(choice.kept.to(torch.uint8).split(lengths))}
    if choice.factors is not None:
        more[FACTORS] = list(choice.factors.split(lengths))
    elif choice.score is not None:
        more[SOFT_SCORES] = list(choice.score.split(lengths))
    for size in (1, 2):
        weights, _, _ = weights_in(worlds[size], answers, rule, THREE, SHUFFLED, more)
        for row in range(NUM_ROWS):
            torch.testing.assert_close(weights[row], expected[row], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("values", "broken", "message"),
    [
        ({"score": "surprisal"}, "old_log_probs", "score=surprisal: it gave nan for a token"),
        ({"score": "covariance"}, "old_log_probs", "score=covariance: it gave nan for a token"),
        ({"score": "rsi", "where": "log_prob < 0"}, "old_log_probs", "score=rsi: it gave nan for a token"),
        ({"pool": "response"}, "old_entropy", "the score of a response token is not finite"),
        ({"pool": "response", "use": "weight"}, "old_entropy", "map=linear gave a factor of -9"),
    ],
)
def test_what_fails_on_one_rank_stops_all(
    worlds: dict[int, Processes], values: dict[str, Any], broken: str, message: str
) -> None:
    """A number of one rank is broken. No rank waits for another in a collective, and each says where it stands."""
    answers = make_answers(35)
    row = next(row for row in SHUFFLED[:6] if answers.masks[row].all())
    getattr(answers, broken)[row][:] = -9.0 if "factor" in message else math.nan
    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        weights_in(worlds[2], answers, Rule.of(**values, top_ratio=1.0 if "use" in values else 0.2), THREE, SHUFFLED)
    assert time.monotonic() - start < 30
    said = str(error.value)
    assert f"EntropyForkError: {message}" in said
    assert said.count(message) > 1 or "rank 0 of 2 has failed in this mini-batch; see its own message" in said
    assert len(set(re.findall(r"EntropyForkError: .* \(in .* pid (\d+)", said))) == 2
    weights_in(worlds[2], make_answers(35), Rule.of(**values), THREE, SHUFFLED)  # the group still works
