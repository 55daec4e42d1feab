"""The real ``verl.trainer.main_ppo``, in separate processes, on a tiny random model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.main_ppo import ONE_POOL, Finished, Recorded, load, spy_environment
from helpers.places import PYTHONPATH, REPOSITORY, TESTS
from safetensors.torch import load_file

from benchmarks.gpu.training import METRICS, measure
from entropy_fork.common.output_folder import SELECTION_FILE
from entropy_fork.tokens.store import read_answers
from entropy_fork.watch.follow import steps_of

pytestmark = pytest.mark.e2e


@pytest.mark.main_job
def test_the_weights_in_the_worker_are_the_ones_selected(main_ppo, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """With two FSDP ranks, dynamic batches and two mini-batches, the loss sees exactly what the driver selected."""
    ranks = 2
    spy = tmp_path / "spy"
    run = main_ppo(
        f"trainer.n_gpus_per_node={ranks}",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256",
        "entropy_fork.dump_every=1",
        "entropy_fork.dump_answers=32",
        **spy_environment(spy),
    )
    (selection,) = load(spy, "selection")
    lengths = selection["lengths"].tolist()
    rows = {name: selection[name].split(lengths) for name in ("weights", "entropy", "response_mask")}

    # 1. The selection is the top 20% of each mini-batch, restated here.
    for pool in selection["mini_batch"].unique():
        members = (selection["mini_batch"] == pool).nonzero().squeeze(1).tolist()
        entropy = torch.cat([rows["entropy"][row] for row in members])
        weights = torch.cat([rows["weights"][row] for row in members])
        num_kept = math.ceil(entropy.numel() / 5)
        assert torch.cat([rows["response_mask"][row] for row in members]).all()
        assert (weights > 0).sum() == num_kept
        assert entropy[weights > 0].min() >= entropy[weights == 0].max()
        torch.testing.assert_close(weights[weights > 0], torch.full((num_kept,), entropy.numel() / num_kept))

    # 2. Exactly these weights arrived in the workers, row by row, in as many micro-batches as the workers cut.
    losses = load(spy, "loss")
    assert len(losses) > ranks * 2, "dynamic batching should have cut more micro-batches than mini-batches"
    arrived = sorted(
        tuple(weights[: int(mask.sum())].tolist())
        for loss in losses
        for weights, mask in zip(loss["rollout_is_weights"], loss["response_mask"], strict=True)
    )
    assert arrived == sorted(tuple(row.tolist()) for row in rows["weights"])

    # 3. The metrics agree.
    kept = sum(math.ceil(sum(lengths[i] for i in range(len(lengths)) if selection["mini_batch"][i] == p) / 5)
               for p in selection["mini_batch"].unique())  # fmt: skip
    assert run.metric("entropy_fork/kept_tokens") == [kept]
    assert run.metric("entropy_fork/kept_ratio") == [pytest.approx(kept / sum(lengths))]
    assert run.metric("entropy_fork/entropy_kept")[0] > run.metric("entropy_fork/entropy_dropped")[0]
    assert run.metric("training/rollout_probs_diff_max")[0] < 1e-4, "the weight sync does not work"
    assert "is active in" in run.output

    # 4. The LM head computed only the positions that are needed. 'make gpu' reads the same metrics of such a run.
    steps = [step.metrics for step in steps_of(run.folder / "checkpoints") if step.number > 0]
    columns = {number.measure: number.value for number in measure("run", steps)}
    assert columns.keys() == {"steps", *METRICS.values()}, "a GPU's run would have an empty column"
    assert columns["kept share"] == run.metric("entropy_fork/kept_ratio")[0]
    assert run.metric("actor/ppo_kl")
    assert "the LM head of an update computes kept positions only" in run.output
    assert "the LM head sees every position" not in run.output

    # 5. The dump of the step has all of this, and nothing else.
    answers = list(read_answers(run.folder / "checkpoints" / "tokens"))
    assert sorted((tuple(answer.entropy), tuple(answer.selected)) for answer in answers) == sorted(
        (tuple(entropy.tolist()), tuple((weights > 0).tolist()))
        for entropy, weights in zip(rows["entropy"], rows["weights"], strict=True)
    )
    assert {answer.step for answer in answers} == {1}
    assert len({answer.ground_truth for answer in answers[:8]}) > 1, "the first answers should be of different prompts"
    old = torch.cat([torch.from_numpy(answer.log_prob) for answer in answers])
    seen = torch.cat([loss["old_log_prob"][loss["response_mask"].bool()] for loss in losses])
    torch.testing.assert_close(old.sort().values, seen.sort().values)
    for answer in answers:
        assert answer.text in "".join(answer.pieces) or "\ufffd" in answer.text  # bytes that form no character
        assert answer.data_source == "cpu_demo"
        assert answer.truncated == (len(answer.token_ids) == 24 and answer.pieces[-1] != "<|endoftext|>")
    scores = [answer.score for answer in answers]
    assert run.metric("critic/score/mean") == [pytest.approx(sum(scores) / len(scores), abs=1e-5)]


def test_the_worker_selects_by_the_current_policys_entropies(main_ppo, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The authors' method on two ranks. The workers shuffle the mini-batches and use them twice."""
    spy = tmp_path / "spy"
    run = main_ppo(
        "entropy_fork=official",
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256",
        "actor_rollout_ref.actor.shuffle=true",
        "actor_rollout_ref.actor.ppo_epochs=2",
        **spy_environment(spy),
    )
    assert not load(spy, "selection"), "the driver selected as well"
    micro_batches = load(spy, "step")
    num_mini_batches = 2 * 2  # two of them, twice
    assert len(micro_batches) > 2 * num_mini_batches, "dynamic batching should have cut the mini-batches"

    # 1. The top 20% of each micro-batch is kept, and each kept token has the factor of its whole mini-batch.
    for part in micro_batches:
        num_kept = math.ceil(part["entropy"].numel() / 5)
        assert part["response_mask"].all()
        assert part["kept"].sum() == num_kept
        assert part["entropy"][part["kept"]].min() >= part["entropy"][~part["kept"]].max()
        num_tokens, num_kept_by_all = part["counts"].tolist()
        factor = torch.full((num_kept,), num_tokens / num_kept_by_all)
        torch.testing.assert_close(part["weights"][part["kept"]], factor)
        assert not part["weights"][~part["kept"]].any()

    # 2. The counts computed in advance are those of all micro-batches, over both ranks and all gradient steps.
    assert sorted(row for part in micro_batches for row in part["rows"].tolist()) == sorted([*range(32), *range(32)])
    announced = {tuple(part["counts"].tolist()) for part in micro_batches}
    everything = sum(part["entropy"].numel() for part in micro_batches)
    kept = sum(int(part["kept"].sum()) for part in micro_batches)
    assert len(announced) <= num_mini_batches
    if len(announced) == num_mini_batches:
        assert (sum(n for n, _ in announced), sum(k for _, k in announced)) == (everything, kept)

    # 3. Exactly these weights arrived in verl's loss.
    arrived = sorted(
        tuple(weights[: int(mask.sum())].tolist())
        for loss in load(spy, "loss")
        for weights, mask in zip(loss["rollout_is_weights"], loss["response_mask"], strict=True)
    )
    made = [row for part in micro_batches for row in part["weights"].split(part["lengths"].tolist())]
    assert arrived == sorted(tuple(row.tolist()) for row in made)

    # 4. The metrics agree.
    assert run.metric("entropy_fork/kept_ratio") == [pytest.approx(kept / everything)]
    assert run.metric("entropy_fork/kept_tokens") == [pytest.approx(kept / 2)]
    assert 0.5 < run.metric("entropy_fork/overlap_with_old")[0] <= 1.0


#: nats; and a tenth of the learning rate (Adam moves a parameter by about the learning rate in one step)
ENTROPY_ERROR, PARAMETER_ERROR = 1e-4, 2e-5


@pytest.mark.main_job
def test_a_ratio_of_one_trains_exactly_as_stock_verl_does(main_ppo, recorded: Recorded, world: Path) -> None:  # type: ignore[no-untyped-def]
    """On the same recorded answers, runs without the node and with ρ = 1.0 end with equal parameters, bit for bit."""
    stock = main_ppo("~entropy_fork", "~entropy_fork_guards", *recorded.replay, folder="stock")
    everything = main_ppo("entropy_fork.top_ratio=1.0", *recorded.replay, folder="everything")
    for run in (stock, everything):
        assert "Injected 32 cached trajectories" in run.output
    assert "entropy_fork" not in "".join(re.findall(r"step:1 - .*", stock.output))
    assert everything.metric("entropy_fork/kept_ratio") == [1.0]

    start = load_file(world / "model" / "model.safetensors")
    parameters = everything.parameters(1)
    for name, parameter in stock.parameters(1).items():
        assert torch.equal(parameter, parameters[name]), name
    assert not torch.equal(parameters["model.norm.weight"], start["model.norm.weight"]), "nothing was trained"


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_number_of_ranks_changes_nothing(main_ppo, recorded: Recorded, ranks: int) -> None:  # type: ignore[no-untyped-def]
    """The same recorded answers on more FSDP ranks: the same tokens are kept, with the same parameters up to rounding.

    A rank packs other answers together, so entropies differ in their last bits. If two entropies are equal except for
    these bits, like those of the first tokens of answers to one prompt, either token may be the last one that is kept.
    """
    one = recorded.run
    several = on_ranks(main_ppo, recorded, ranks)
    for step in (1, 2):
        expected, actual = tokens_of(one, step), tokens_of(several, step)
        assert [(token.answer, token.position) for token in expected] == [(t.answer, t.position) for t in actual]
        error = max(abs(a.entropy - b.entropy) for a, b in zip(expected, actual, strict=True))
        assert error < ENTROPY_ERROR
        assert sum(token.kept for token in expected) == sum(token.kept for token in actual)
        (threshold,) = one.metric("entropy_fork/threshold")[step - 1 : step]
        for a, b in zip(expected, actual, strict=True):
            assert a.kept == b.kept or abs(a.entropy - threshold) <= 2 * error


def test_workers_on_two_ranks_select_what_one_driver_does(main_ppo, recorded: Recorded) -> None:  # type: ignore[no-untyped-def]
    """The paper's equation, in steps with one gradient step, where the current policy is still the old one.

    So the ranks together must find the same threshold as the driver of a run on one rank, and keep the same number of
    tokens. They must also keep the same tokens: one token more or less moves parameters by the learning rate.
    """
    one = recorded.run
    several = on_ranks(main_ppo, recorded, 2, "entropy_fork.entropy=current", "entropy_fork.pool=mini_batch")
    for name in ("entropy_fork/threshold", "entropy_fork/kept_tokens"):
        assert several.metric(name) == pytest.approx(one.metric(name)[:2], abs=ENTROPY_ERROR)


def on_ranks(main_ppo, recorded: Recorded, ranks: int, *overrides: str) -> Finished:  # type: ignore[no-untyped-def]
    """Run two of the recorded steps, and check that the parameters are those of one rank."""
    settings = (*recorded.replay, *ONE_POOL, "trainer.total_training_steps=2")
    run = main_ppo(f"trainer.n_gpus_per_node={ranks}", *settings, *overrides)
    assert run.output.count("Injected 32 cached trajectories") == 2
    for step in (1, 2):
        parameters = run.parameters(step)
        for name, parameter in recorded.run.parameters(step).items():
            torch.testing.assert_close(parameters[name], parameter, rtol=0, atol=PARAMETER_ERROR)
    return run


class Token(NamedTuple):
    """A response token, identified by its prompt, its answer and its position."""

    answer: tuple[tuple[int, ...], tuple[int, ...]]
    position: int
    entropy: float
    kept: bool


def tokens_of(run: Finished, step: int) -> list[Token]:
    """All tokens of a dumped step, in order. Of tokens with equal answer and position, kept ones come first."""
    answers = [answer for answer in read_answers(run.folder / "checkpoints" / "tokens") if answer.step == step]
    assert len(answers) == 32
    return sorted(
        (
            Token((tuple(answer.prompt_ids.tolist()), tuple(answer.token_ids.tolist())), position, float(h), bool(kept))
            for answer in answers
            for position, (h, kept) in enumerate(zip(answer.entropy, answer.selected, strict=True))
        ),
        key=lambda token: (token.answer, token.position, not token.kept),
    )


@pytest.mark.main_job
def test_the_papers_equation_with_a_critic_a_reference_and_a_resume(main_ppo) -> None:  # type: ignore[no-untyped-def]
    """Current entropies over the mini-batch, together with a critic, a KL loss, an entropy bonus and validation.

    The run stops after step 1 and resumes for step 2. Each step has one gradient step, in which the current policy is
    still the old one, so both must select the same tokens.
    """
    settings = [
        "entropy_fork.entropy=current",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "algorithm.adv_estimator=gae",
        "critic.model.path=${demo.dir}/model",
        "critic.ppo_micro_batch_size_per_gpu=4",
        "critic.optim.lr=1e-4",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.entropy_coeff=0.001",
        "trainer.test_freq=1",
    ]
    first = main_ppo(*settings)
    assert first.metric("val-core/cpu_demo/acc/mean@1")
    baseline = main_ppo(*settings, "entropy_fork=off", expect=1)
    assert "global_step_1 was trained on the tokens of top_ratio=0.2 select=top entropy=current" in baseline.output
    assert "ray init kwargs" not in baseline.output
    second = main_ppo(*settings, "trainer.total_training_steps=2", "trainer.val_before_train=true")
    assert "setting global step to 1" in second.output
    assert "step:2 - " in second.output
    assert "step:1 - " not in second.output.replace("step:1 - val", "")
    assert second.metric("training/rollout_probs_diff_max")[0] < 1e-4
    assert len(second.parameters(2)) == len(first.parameters(1))
    for run in (first, second):
        assert run.metric("entropy_fork/kept_ratio") == [pytest.approx(0.2, abs=0.005)]
        assert run.metric("entropy_fork/overlap_with_old") == [pytest.approx(1.0, abs=0.01)]
        for name in ("critic/vf_loss", "actor/kl_loss", "actor/entropy_loss", "entropy_fork/kept_ratio_positive"):
            assert len(run.metric(name)) == 1, name


def test_a_users_own_score_and_condition(main_ppo) -> None:  # type: ignore[no-untyped-def]
    """The score of examples/own_score.py, on two ranks, restated here from what the run dumped."""
    where = "position > 0 and entropy > 0.001"
    run = main_ppo(
        *ONE_POOL,
        "trainer.n_gpus_per_node=2",
        "entropy_fork.score=examples.own_score:early_forks",
        f'entropy_fork.where="{where}"',
        "entropy_fork.observe=[entropy,random]",
        PYTHONPATH=PYTHONPATH,
    )
    tokens = [
        (entropy * (1 - position / len(answer.entropy)), entropy, position, bool(selected))
        for answer in read_answers(run.folder / "checkpoints" / "tokens")
        for position, (entropy, selected) in enumerate(zip(answer.entropy.tolist(), answer.selected, strict=True))
    ]
    in_pool = [token for token in tokens if token[2] > 0 and token[1] > 0.001]
    kept = [token for token in tokens if token[3]]
    assert 0 < len(in_pool) < len(tokens)
    assert len(kept) == math.ceil(len(in_pool) / 5)
    best = sorted(score for score, *_ in in_pool)[-len(kept) :]
    assert sorted(score for score, *_ in kept) == pytest.approx(best, rel=1e-5)
    assert run.metric("entropy_fork/threshold") == [pytest.approx(best[0], rel=1e-5)]
    assert run.metric("entropy_fork/outside_ratio") == [pytest.approx(1 - len(in_pool) / len(tokens))]
    highest = sorted(in_pool, key=lambda token: token[1])[-len(kept) :]
    shared = sum(token[3] for token in highest) / len(kept)
    assert run.metric("entropy_fork/overlap_with_entropy") == [pytest.approx(shared, abs=1.5 / len(kept))]  # ties
    assert run.metric("entropy_fork/rank_correlation_with_entropy")[0] > 0.5
    assert abs(run.metric("entropy_fork/rank_correlation_with_random")[0]) < 0.2
    assert "score=examples.own_score:early_forks" in run.output
    trained_on = json.loads((run.folder / "checkpoints/global_step_1" / SELECTION_FILE).read_text())["trained_on"]
    assert (trained_on["score"], trained_on["where"]) == ("examples.own_score:early_forks", where)


def test_forks_of_the_td_residual_by_plain_reinforce(main_ppo, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The ladder's sixth form on forks: the critic's values reach Ψ, and Ψ reaches the loss, on kept tokens only.

    The ladder's measurement of the gradient runs too. And the program is a user's own: its task runner makes a trainer
    that derives from verl's and is not registered, and it does not call verl's validate_config.
    """
    spy, gradients = tmp_path / "spy", tmp_path / "gradients.jsonl"
    environment = spy_environment(spy)
    environment["VERL_USE_EXTERNAL_MODULES"] += ",gradient_variance"
    environment["PYTHONPATH"] += f":{REPOSITORY / 'examples' / 'research' / 'policy_gradient_ladder'}"
    run = main_ppo(
        *("algorithm.adv_estimator=td_residual", "critic.enable=true", "entropy_fork=global", "algorithm.gamma=0.9"),
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        recipe=("+recipe=ladder_cpu",),
        program=(str(TESTS / "helpers" / "own_program.py"),),
        ENTROPY_FORK_GRADIENTS=str(gradients),
        **environment,
    )
    assert "OwnTrainer is what trains" in run.output
    assert run.metric("own/rows") == [32]
    (batch,) = load(spy, "advantages")
    psi = batch["advantages"]
    for row, mask in enumerate(batch["response_mask"].bool()):
        rewards, values = batch["token_level_rewards"][row][mask].tolist(), batch["values"][row][mask].tolist()
        residuals = [r + 0.9 * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0], strict=True)]
        assert psi[row][mask].tolist() == pytest.approx(residuals, abs=1e-5)
    assert batch["token_level_rewards"].count_nonzero() > 0

    seen = load(spy, "loss")
    assert len(seen) == 8  # groups of four answers

    def rows(batches: list[dict[str, torch.Tensor]]) -> list[list[float]]:
        pairs = [pair for b in batches for pair in zip(b["advantages"], b["response_mask"].bool(), strict=True)]
        return sorted(psi[mask].tolist() for psi, mask in pairs)

    assert rows(seen) == rows([batch])
    tokens = sum(int(step["response_mask"].sum()) for step in seen)
    kept = sum(int((step["rollout_is_weights"] * step["response_mask"] != 0).sum()) for step in seen)
    assert kept == math.ceil(0.2 * tokens)
    (line,) = [json.loads(line) for line in gradients.read_text().splitlines()]
    assert line["terms"] == 8
    assert math.sqrt(line["square"]) == pytest.approx(run.metric("actor/grad_norm")[0], rel=1e-4)


def test_the_colocated_asynchronous_trainer_is_masked_too(main_ppo) -> None:  # type: ignore[no-untyped-def]
    """It has its own trainer class, and interrupts and continues answers. The run uses another preset."""
    run = main_ppo("trainer.v1.trainer_mode=colocate_async", "trainer.total_training_steps=2", "entropy_fork=bottom80")
    assert run.metric("entropy_fork/kept_ratio") == [pytest.approx(0.8, abs=0.01)] * 2
    kept, dropped = run.metric("entropy_fork/entropy_kept"), run.metric("entropy_fork/entropy_dropped")
    assert all(low < high for low, high in zip(kept, dropped, strict=True))
    # only the first step, because in this mode the policy before began the answers of the second step
    assert run.metric("training/rollout_probs_diff_max")[0] < 1e-4


def test_the_separate_asynchronous_trainer_is_masked_too(main_ppo) -> None:  # type: ignore[no-untyped-def]
    """Two FSDP ranks send their weights, in several buckets, to a separate server, and make two updates in between.

    No answers are requested in advance, so the answers of a step come from the weights that were sent last. The test
    compares their log-probabilities with the trainer's at that time. Both steps would show if the second update had
    lost the policy of its answers. The second step would show if the weights had not arrived.
    """
    run = main_ppo(
        "trainer.v1.trainer_mode=separate_async",
        "trainer.v1.separate_async.parameter_sync_step=2",
        "trainer.v1.separate_async.num_warmup_batches=0",
        "trainer.total_training_steps=2",
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.n_gpus_per_node=1",
        "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=1",
    )
    assert run.metric("entropy_fork/kept_ratio") == [pytest.approx(0.2, abs=0.01)] * 2
    assert run.metric("training/off_policy/trajectory_staleness/max") == [0, 0]
    assert max(run.metric("training/rollout_probs_diff_max")) < 1e-4
