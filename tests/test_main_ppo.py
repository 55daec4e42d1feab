"""The real ``verl.trainer.main_ppo``, in processes of its own, on a tiny random model."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parent
pytestmark = pytest.mark.e2e


@dataclass
class Finished:
    """A run that has ended."""

    output: str
    folder: Path

    def metric(self, name: str) -> list[float]:
        """A metric by step, as verl's console logger printed it."""
        pattern = re.compile(rf"step:[1-9]\d* - .*?{re.escape(name)}:(?:np\.\w+\()?([-\d.e+]+)")
        return [float(value) for value in pattern.findall(self.output)]

    def parameters(self, step: int) -> dict[str, torch.Tensor]:
        """The trained parameters of a checkpoint, ranks side by side."""
        shards = sorted((self.folder / "checkpoints" / f"global_step_{step}" / "actor").glob("model_*.pt"))
        assert shards, self.output[-3000:]
        states = [torch.load(shard, weights_only=False) for shard in shards]
        local = [{name: getattr(t, "_local_tensor", t) for name, t in state.items()} for state in states]
        return {name: torch.cat([part[name].flatten() for part in local]) for name in local[0]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's world with hardly any warm-up: random answers do for these tests."""
    folder = tmp_path_factory.mktemp("world") / "world"
    build = TESTS.parent / "examples" / "cpu_demo" / "build.py"
    arguments = ["--steps", "30", "--train-problems", "64", "--test-problems", "8", "--warmup-problems", "500"]
    subprocess.run([sys.executable, str(build), "--output", str(folder), *arguments], check=True, timeout=300)
    return folder


@pytest.fixture
def main_ppo(world: Path, tmp_path: Path) -> Iterator:
    """Run main_ppo to its end in a session of its own, which is ended whatever happens."""
    groups: list[int] = []
    ray_folder = tempfile.mkdtemp(prefix="ef")  # short: Ray puts sockets there

    def run(*overrides: str, expect: int = 0, folder: str = "run", **environment: str) -> Finished:
        directory = tmp_path / folder
        directory.mkdir(exist_ok=True)
        arguments = [
            sys.executable, "-m", "verl.trainer.main_ppo", "+recipe=demo_cpu", f"demo.dir={world}",
            "data.train_batch_size=8", "data.max_response_length=24", "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4", "algorithm.filter_groups.enable=false",
            "reward.reward_kwargs.overlong_buffer_cfg.len=8", "trainer.total_training_steps=1",
            "trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=1", "trainer.logger=[console]",
            f"trainer.default_local_dir={directory}/checkpoints", f"hydra.run.dir={directory}/hydra", *overrides,
        ]  # fmt: skip
        process = subprocess.Popen(
            arguments,
            cwd=directory,
            env={
                **os.environ,
                "PYTHONWARNINGS": "ignore",
                "VERL_PLATFORM": "cpu",
                "RAY_TMPDIR": ray_folder,
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        groups.append(process.pid)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == expect, output[-6000:]
        return Finished(output, directory)

    yield run
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue
    shutil.rmtree(ray_folder, ignore_errors=True)


def spy_environment(folder: Path) -> dict[str, str]:
    folder.mkdir()
    return {"VERL_USE_EXTERNAL_MODULES": "spy", "PYTHONPATH": str(TESTS), "ENTROPY_FORK_SPY": str(folder)}


def load(folder: Path, kind: str) -> list[dict[str, torch.Tensor]]:
    return [torch.load(file) for file in sorted(folder.glob(f"{kind}-*.pt"))]


def test_the_weights_in_the_worker_are_the_ones_selected(main_ppo, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Two FSDP ranks, dynamic batches, two mini-batches: what the loss sees is what the driver selected."""
    ranks = 2
    spy = tmp_path / "spy"
    run = main_ppo(
        f"trainer.n_gpus_per_node={ranks}",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256",
        **spy_environment(spy),
    )
    (selection,) = load(spy, "selection")
    lengths = selection["lengths"].tolist()
    rows = {name: selection[name].split(lengths) for name in ("weights", "entropy", "response_mask")}

    # 1. The selection is the top 20% of each mini-batch, re-stated here.
    for pool in selection["mini_batch"].unique():
        members = (selection["mini_batch"] == pool).nonzero().squeeze(1).tolist()
        entropy = torch.cat([rows["entropy"][row] for row in members])
        weights = torch.cat([rows["weights"][row] for row in members])
        num_kept = math.ceil(entropy.numel() / 5)
        assert torch.cat([rows["response_mask"][row] for row in members]).all()
        assert (weights > 0).sum() == num_kept
        assert entropy[weights > 0].min() >= entropy[weights == 0].max()
        torch.testing.assert_close(weights[weights > 0], torch.full((num_kept,), entropy.numel() / num_kept))

    # 2. What arrived in the workers, row by row, is exactly that, in as many micro-batches as they cut.
    losses = load(spy, "loss")
    assert len(losses) > ranks * 2, "dynamic batching should have cut more micro-batches than mini-batches"
    arrived = sorted(
        tuple(weights[: int(mask.sum())].tolist())
        for loss in losses
        for weights, mask in zip(loss["rollout_is_weights"], loss["response_mask"], strict=True)
    )
    assert arrived == sorted(tuple(row.tolist()) for row in rows["weights"])

    # 3. The metrics say it.
    kept = sum(math.ceil(sum(lengths[i] for i in range(len(lengths)) if selection["mini_batch"][i] == p) / 5)
               for p in selection["mini_batch"].unique())  # fmt: skip
    assert run.metric("entropy_fork/kept_tokens") == [kept]
    assert run.metric("entropy_fork/kept_ratio") == [pytest.approx(kept / sum(lengths))]
    assert run.metric("entropy_fork/entropy_kept")[0] > run.metric("entropy_fork/entropy_dropped")[0]
    assert run.metric("training/rollout_probs_diff_max")[0] < 1e-4, "the weight sync does not work"
    assert "is active in" in run.output


def test_the_worker_selects_by_the_current_policys_entropies(main_ppo, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The authors' method on two ranks, with mini-batches that the workers shuffle and go through twice."""
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

    # 1. The top 20% of each micro-batch, each kept token with the factor of its whole mini-batch.
    for part in micro_batches:
        num_kept = math.ceil(part["entropy"].numel() / 5)
        assert part["response_mask"].all()
        assert part["kept"].sum() == num_kept
        assert part["entropy"][part["kept"]].min() >= part["entropy"][~part["kept"]].max()
        num_tokens, num_kept_by_all = part["counts"].tolist()
        factor = torch.full((num_kept,), num_tokens / num_kept_by_all)
        torch.testing.assert_close(part["weights"][part["kept"]], factor)
        assert not part["weights"][~part["kept"]].any()

    # 2. The announced counts are those of all micro-batches, over both ranks and all gradient steps.
    assert sorted(row for part in micro_batches for row in part["rows"].tolist()) == sorted([*range(32), *range(32)])
    announced = {tuple(part["counts"].tolist()) for part in micro_batches}
    everything = sum(part["entropy"].numel() for part in micro_batches)
    kept = sum(int(part["kept"].sum()) for part in micro_batches)
    assert len(announced) <= num_mini_batches
    if len(announced) == num_mini_batches:
        assert (sum(n for n, _ in announced), sum(k for _, k in announced)) == (everything, kept)

    # 3. What arrived in verl's loss is exactly that.
    arrived = sorted(
        tuple(weights[: int(mask.sum())].tolist())
        for loss in load(spy, "loss")
        for weights, mask in zip(loss["rollout_is_weights"], loss["response_mask"], strict=True)
    )
    made = [row for part in micro_batches for row in part["weights"].split(part["lengths"].tolist())]
    assert arrived == sorted(tuple(row.tolist()) for row in made)

    # 4. The metrics say it.
    assert run.metric("entropy_fork/kept_ratio") == [pytest.approx(kept / everything)]
    assert run.metric("entropy_fork/kept_tokens") == [pytest.approx(kept / 2)]
    assert 0.5 < run.metric("entropy_fork/overlap_with_old")[0] <= 1.0


def test_a_ratio_of_one_trains_exactly_as_stock_verl_does(main_ppo, world: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The same recorded answers, without the plugin's config node and with ρ = 1.0: the same parameters bit for bit.

    Both runs replay, because verl lays out recorded answers in the order of the record and new ones as they come.
    """
    answers = tmp_path / "answers"
    replay = ["skip.rollout_tq.enable=true", f"skip.rollout_tq.dump_dir={answers}", "skip.rollout_tq.steps=[1]"]
    main_ppo(*replay, folder="record")
    stock = main_ppo("~entropy_fork", *replay, folder="stock")
    everything = main_ppo("entropy_fork.top_ratio=1.0", *replay, folder="everything")
    for run in (stock, everything):
        assert "Injected 32 cached trajectories" in run.output
    assert "entropy_fork" not in "".join(re.findall(r"step:1 - .*", stock.output))
    assert everything.metric("entropy_fork/kept_ratio") == [1.0]

    start = load_file(world / "model" / "model.safetensors")
    parameters = everything.parameters(1)
    for name, parameter in stock.parameters(1).items():
        assert torch.equal(parameter, parameters[name]), name
    assert not torch.equal(parameters["model.norm.weight"], start["model.norm.weight"]), "nothing was trained"


def test_the_papers_equation_with_a_critic_a_reference_and_a_resume(main_ppo) -> None:  # type: ignore[no-untyped-def]
    """The current policy's entropies over the mini-batch, beside a critic, a KL loss, an entropy bonus and validation.

    It stops after step 1 and goes on to step 2. Each has one gradient step, in which the current policy still is the
    old one: both must select the same.
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


def test_the_colocated_asynchronous_trainer_is_masked_too(main_ppo) -> None:  # type: ignore[no-untyped-def]
    """Its own trainer class, answers that are interrupted and taken up again, and another preset."""
    run = main_ppo("trainer.v1.trainer_mode=colocate_async", "trainer.total_training_steps=2", "entropy_fork=bottom80")
    assert run.metric("entropy_fork/kept_ratio") == [pytest.approx(0.8, abs=0.01)] * 2
    kept, dropped = run.metric("entropy_fork/entropy_kept"), run.metric("entropy_fork/entropy_dropped")
    assert all(low < high for low, high in zip(kept, dropped, strict=True))
    # only the first step: the answers of the second were begun by the policy before it, as this mode has it
    assert run.metric("training/rollout_probs_diff_max")[0] < 1e-4


def test_the_separate_asynchronous_trainer_is_masked_too(main_ppo) -> None:  # type: ignore[no-untyped-def]
    """Two FSDP ranks send their weights, in several buckets, to a server of its own, and take two updates in between.

    With no answers ordered in advance each step's come from the weights that were sent last, and are compared with the
    trainer's at that time. Both steps tell when the second update has lost the policy that its answers came from, and
    the second step tells when the weights did not arrive.
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
