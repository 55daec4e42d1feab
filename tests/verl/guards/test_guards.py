"""Faults in a long run: it goes on, or stops with one clear error, and never resumes from a half-written checkpoint.

These tests make no real runs. Real runs are in e2e/test_killed_run.py (a run that is killed) and in faults/ (``make
faults``, one run for each other fault). Answers for which a reward never ends are in test_reward.py.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.rows import jagged
from omegaconf import OmegaConf
from ray.exceptions import ActorDiedError, ActorUnavailableError

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.evaluation.checkpoint import Checkpoint
from entropy_fork.tokens.store import read_answers
from entropy_fork.verl.checks import check_before_training
from entropy_fork.verl.config import EntropyForkConfig
from entropy_fork.verl.guards import checkpoint, waiting
from entropy_fork.verl.masking import masking_of
from entropy_fork.verl.queued_batch import tq
from entropy_fork.verl.token_dump import TokenDump

LATEST = "latest_checkpointed_iteration.txt"


# ------------------------------------------------------------------------------------------------------ checkpoints


class Killed(BaseException):
    """An exception that nothing catches, like SIGKILL."""


class Stock:
    """The part of verl's trainer that saves checkpoints: the same files, in the same order. A kill can hit each."""

    use_critic = True

    def __init__(self, config: Any, killed_in: float | None = None):
        self.config, self.global_steps, self.killed_in = config, 0, killed_in
        self.actor_rollout_wg = self.critic_wg = SimpleNamespace(workers=[Worker(0), Worker(1)])
        self.loaded = False

    def _save_checkpoint(self) -> None:
        root = Path(self.config.trainer.default_local_dir)
        folder = root / f"global_step_{self.global_steps}"
        shards = [
            f"{role}/{kind}_world_size_2_rank_{rank}.pt"
            for role in ("actor", "critic")
            for kind in ("model", "optim", "extra_state")
            for rank in (0, 1)
        ]
        for number, name in enumerate([*shards, "data.pt"]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save({"of run": self.config.run}, folder / name)
            if self.killed_in == number:
                content = (folder / name).read_bytes()
                (folder / name).write_bytes(content[: len(content) // 2])
                raise Killed
            if self.killed_in == number + 0.5:  # between this one and the next
                raise Killed
        with open(root / LATEST, "w") as latest:
            if self.killed_in == len(shards) + 1:
                raise Killed
            latest.write(str(self.global_steps))
        if self.killed_in == len(shards) + 2:
            raise Killed

    def _load_checkpoint(self) -> None:
        self.loaded = True


class Trainer(checkpoint.WholeCheckpoints, Stock): ...


class Worker:
    """One of two training workers. It answers at once."""

    def __init__(self, rank: int):
        self.rank = rank
        self.__ray_call__ = SimpleNamespace(remote=self.call)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint.dist, "get_rank", lambda: self.rank)
            patch.setattr(checkpoint.dist, "get_world_size", lambda: 2)
            return function(self, *arguments)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    monkeypatch.setattr(checkpoint.ray, "get", lambda answers: answers)

    def make(run: str = "first", killed_in: float | None = None, **of_trainer: Any) -> Trainer:
        role = {"strategy": "fsdp2", "checkpoint": {"load_contents": ["model", "optimizer", "extra"]}}
        config = {
            "run": run,
            "entropy_fork_guards": {},
            "actor_rollout_ref": {"actor": role},
            "critic": role,
            "trainer": {"default_local_dir": str(tmp_path), "resume_mode": "auto", "resume_from_path": None},
        }
        config["trainer"].update(of_trainer)
        return Trainer(OmegaConf.create(config), killed_in)

    return make


def save(trainer: Trainer, *steps: int) -> None:
    for trainer.global_steps in steps:
        trainer._save_checkpoint()


#: a kill in each of the 12 files and data.pt, after each, with the file of the latest step empty, and at the end
PLACES = [place / 2 for place in range(26)] + [13, 14]


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_anywhere_in_a_save_leaves_the_checkpoint_before_or_an_error(
    trainer: Callable[..., Trainer], tmp_path: Path, place: float
) -> None:
    save(trainer(), 2)
    with pytest.raises(Killed):
        save(trainer(killed_in=place), 4)
    latest = (tmp_path / LATEST).read_text()
    resumed = trainer()
    if place < 13:
        assert latest == "2"
        resumed._load_checkpoint()
        assert resumed.loaded
    else:  # it is complete, but still marked as unfinished
        with pytest.raises(EntropyForkError, match=r"global_step_2 is whole: write trainer.resume_mode=resume_path"):
            resumed._load_checkpoint()
        assert not resumed.loaded
    resumed = trainer(resume_mode="resume_path", resume_from_path=str(tmp_path / "global_step_4"))
    with pytest.raises(EntropyForkError, match=r"global_step_4 is unfinished"):
        resumed._load_checkpoint()


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_while_a_checkpoint_is_written_again(
    trainer: Callable[..., Trainer], tmp_path: Path, place: float
) -> None:
    """verl already points to step 4. All its files exist and are readable, but some are those of another run."""
    save(trainer("first"), 2, 4)
    with pytest.raises(Killed):
        save(trainer("second", killed_in=place, resume_mode="resume_path"), 4)
    resumed = trainer()
    message = rf"is not whole.*{tmp_path}/global_step_2 is whole: write trainer.resume_mode=resume_path"
    with pytest.raises(EntropyForkError, match=message):
        resumed._load_checkpoint()
    assert not resumed.loaded
    save(trainer("second"), 4)  # once more, without a kill
    resumed._load_checkpoint()
    assert resumed.loaded


def _shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("broken", "breaks", "message"),
    [
        ("actor/optim_world_size_2_rank_1.pt", Path.unlink, r"actor/optim_world_size_2_rank_1.pt is missing"),
        ("critic/model_world_size_2_rank_0.pt", _shortened, r"model_world_size_2_rank_0.pt cannot be read \("),
        ("actor/extra_state_world_size_2_rank_0.pt", lambda p: p.write_bytes(b""), r"rank_0.pt cannot be read \("),
        ("data.pt", Path.unlink, r"data.pt is missing"),
        (f"../{LATEST}", lambda p: p.write_text(""), rf"{LATEST} contains no step but ''"),
        (f"../{LATEST}", lambda p: p.write_text("6"), r"global_step_6 is not there"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(
    trainer: Callable[..., Trainer], tmp_path: Path, broken: str, breaks: Callable[[Path], Any], message: str
) -> None:
    save(trainer(), 2, 4)
    breaks((tmp_path / "global_step_4" / broken).resolve())
    with pytest.raises(EntropyForkError, match=message + ".*trainer.resume_mode=disable to start again"):
        trainer()._load_checkpoint()
    disabled = trainer(resume_mode="disable")
    disabled._load_checkpoint()
    assert disabled.loaded


def test_other_ranks_and_no_whole_checkpoint_at_all(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer()._load_checkpoint()  # nothing there yet
    save(trainer(), 2)
    for path in (tmp_path / "global_step_2" / "actor").iterdir():
        path.rename(path.with_name(path.name.replace("size_2", "size_8")))
    with pytest.raises(
        EntropyForkError, match=r"actor was written by 8 ranks, and this run has 2. No other checkpoint in .* is whole"
    ):
        trainer()._load_checkpoint()


def test_a_save_that_fails_says_where_and_how_much_room_there_is(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(trainer(), 2)

    def full(*_: Any) -> None:
        raise RuntimeError("Traceback of a worker\n  …\n[enforce fail] unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    message = r"step 4 could not be written to .*global_step_4 \(RuntimeError: .enforce fail.*; [\d.]+ GiB are free"
    with pytest.raises(EntropyForkError, match=message):
        save(trainer(), 4)
    assert (tmp_path / "global_step_4" / "unfinished").exists()
    trainer()._load_checkpoint()  # of step 2

    (tmp_path / "file").write_text("")
    with pytest.raises(EntropyForkError, match=r"could not be written to .*file/global_step_2 \(NotADirectoryError"):
        save(trainer(default_local_dir=str(tmp_path / "file")), 2)


def test_nothing_else_takes_it_either(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        save(trainer(killed_in=13), 2)
    for folder in (tmp_path / "global_step_2", tmp_path / "global_step_2" / "actor"):
        with pytest.raises(EntropyForkError, match=r"global_step_2 is not finished .* Name another"):
            Checkpoint.find(folder)


def test_what_an_asynchronous_save_writes_is_left_to_megatron(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    made = trainer(killed_in=3)
    made.config.actor_rollout_ref.actor.checkpoint.async_save = True
    with pytest.raises(Killed):
        save(made, 2)
    assert not (tmp_path / "global_step_2" / "unfinished").exists()


# ---------------------------------------------------------------------------------------------------------- waiting


class Buffer:
    """The part of verl's replay buffer that the guard reads."""

    def __init__(self) -> None:
        self.partitions: dict[str, dict[str, Any]] = {"train": {}}
        self.pending_keys = {"train": {"c"}}
        self.running_keys = {"train": {"a", "b"}}
        self.failure_keys: dict[str, set[str]] = {"train": set()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    clock = SimpleNamespace(now=1000.0, alive=True, asked=0)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock.now)

    def ask() -> str:
        clock.asked += 1
        return f"ref {clock.asked}"

    def get(_: str) -> bool:
        if not clock.alive:
            raise ActorDiedError() if clock.alive is False else ActorUnavailableError("network", None)
        return True

    monkeypatch.setattr(waiting.ray, "wait", lambda refs, num_returns, timeout: (refs, []))
    monkeypatch.setattr(waiting.ray, "get", get)
    worker = SimpleNamespace(__ray_ready__=SimpleNamespace(remote=ask))
    clock.trainer = SimpleNamespace(
        config=OmegaConf.create({"trainer": {"default_local_dir": "checkpoints"}}),
        agent_loop_manager=SimpleNamespace(agent_loop_workers=[worker]),
    )
    return clock


def look(watch: waiting.Watch, buffer: Any) -> None:
    watch.before_asking()
    watch.after_asking(buffer)


def test_a_run_waits_as_long_as_answers_come(clock: SimpleNamespace) -> None:
    watch, buffer = waiting.Watch(clock.trainer, patience_s=60), Buffer()
    for number in range(100):
        clock.now += 2
        if number % 10 == 0:
            buffer.partitions["train"] = {f"answer {number}": {}}  # earlier answers may have been filtered out
        look(watch, buffer)
    clock.now += 100_000  # the driver trains, then asks again
    look(watch, buffer)
    for _ in range(19):
        clock.now += 2
        look(watch, buffer)
    clock.now += 2
    with pytest.raises(EntropyForkError, match=r"for 60 s: 3 prompts are not finished, 2 of them begun.*patience_s"):
        look(watch, buffer)
    assert clock.asked > 100

    patient = waiting.Watch(clock.trainer, patience_s=0)
    for _ in range(10_000):
        clock.now += 2
        look(patient, buffer)


def test_the_dead_are_noticed_and_the_unreachable_asked_again(clock: SimpleNamespace) -> None:
    watch, buffer = waiting.Watch(clock.trainer, patience_s=0), Buffer()
    look(watch, buffer)
    clock.alive = None
    clock.now += 3
    look(watch, buffer)
    clock.alive = False
    clock.now += 1
    look(watch, buffer)  # it is not asked at every turn
    buffer.failure_keys["train"] = {"a"}  # but here
    with pytest.raises(EntropyForkError, match=r"agent-loop worker 0 has died.*resumes from the last checkpoint in ch"):
        look(watch, buffer)


RAY = """
import asyncio, os, signal, tempfile, time
from types import SimpleNamespace
import ray
from omegaconf import OmegaConf
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.verl.guards.waiting import Watch

@ray.remote(num_cpus=0, max_concurrency=10)
class Server:
    async def pid(self):
        return os.getpid()
    async def hang(self):
        time.sleep(1000)

def look(watch, buffer, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        watch.before_asking()
        watch.after_asking(buffer)
        time.sleep(0.1)

with tempfile.TemporaryDirectory(prefix="ef", dir="/tmp") as directory:
    ray.init(num_cpus=1, include_dashboard=False, _temp_dir=directory, logging_level="ERROR", log_to_driver=False)
    try:
        server = Server.remote()
        pid = ray.get(server.pid.remote())
        server.hang.remote()
        trainer = SimpleNamespace(
            config=OmegaConf.create({"trainer": {"default_local_dir": "checkpoints"}}),
            llm_server_manager=SimpleNamespace(server_handles=[server]),
        )
        buffer = SimpleNamespace(partitions={}, pending_keys={}, running_keys={}, failure_keys={})
        watch = Watch(trainer, patience_s=0)
        look(watch, buffer, 3)
        print("it hangs, and is alive")
        os.kill(pid, signal.SIGKILL)
        try:
            look(watch, buffer, 60)
        except EntropyForkError as error:
            print(error)
    finally:
        ray.shutdown()
"""


def test_ray_says_who_has_died(python: Callable[..., Any]) -> None:
    result = python("-c", RAY)
    said = [line for line in result.stdout.splitlines() if "(raylet)" not in line]
    assert said[0] == "it hangs, and is alive", result.stdout + result.stderr[-3000:]
    assert said[1].startswith("rollout server 0 has died, and the run was waiting"), said


def test_a_question_that_is_never_answered_does_not_hide_who_died(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The TransferQueue's controller dies while the driver waits for its answer."""
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 0.05)
    watch, never = waiting.Watch(clock.trainer, patience_s=0), threading.Event()
    asked: list[str] = []
    watch.while_asking(lambda: asked.append("once"))
    assert asked == ["once"]

    def fail() -> None:
        raise TimeoutError("of the question itself")

    with pytest.raises(TimeoutError, match="of the question itself"):
        watch.while_asking(fail)
    clock.alive = False
    with pytest.raises(EntropyForkError, match="agent-loop worker 0 has died"):
        watch.while_asking(never.wait)  # type: ignore[arg-type]
    never.set()


@pytest.mark.parametrize(
    ("node", "watched"), [({"patience_s": 5}, True), ({}, True), ({"waiting": False}, False), (None, False)]
)
def test_verls_replay_buffers_ask_through_the_watch(
    monkeypatch: pytest.MonkeyPatch, node: dict[str, Any] | None, watched: bool
) -> None:
    """Fails if verl asks in another way."""
    from verl.trainer.ppo.v1 import replay_buffer

    class Stock:
        config = OmegaConf.create({"entropy_fork": {}} if node is None else {"entropy_fork_guards": node})

        def _build_replay_buffer(self) -> Any:
            return replay_buffer.ReplayBufferAsync("colocate_async", {}, None, "drop", {}, poll_interval=0.0)

    class Trainer(waiting.WatchedWaiting, Stock): ...

    class Looked(Exception): ...

    def look(*_: Any) -> None:
        raise Looked

    lists = iter([{}, {"train": {"a": {"is_prompt": True, "status": "finished", "global_steps": 1}}}])
    monkeypatch.setattr(replay_buffer.tq, "kv_list", lambda *_: next(lists))
    monkeypatch.setattr(waiting.Watch, "after_asking", look)
    buffer = Trainer()._build_replay_buffer()
    if watched:
        with pytest.raises(Looked):
            buffer.wait_for_sampleable(1, "train", 1)
        with pytest.raises(Looked):
            replay_buffer.ReplayBuffer.sample.__wrapped__(buffer, 1, "train", 1)
    else:
        assert buffer.wait_for_sampleable(1, "train", 1)[0] == {"a"}


# --------------------------------------------------------------------------------------------------- rollout server


def test_a_request_that_fails_or_is_given_up_does_not_hold_up_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from entropy_fork.verl.cpu import rollout

    def generate(model: Any, requests: list[Any], *_: Any) -> list[Any]:
        time.sleep(0.1)
        if requests[0].prompt_ids == [13]:
            raise RuntimeError("no memory")
        return [rollout.Answer(token_ids=[7]) for request in requests if request.prompt_ids != [14]]

    monkeypatch.setattr(rollout, "generate", generate)

    async def ask() -> None:
        server = rollout.TransformersServer.__new__(rollout.TransformersServer)
        server.config = SimpleNamespace(prompt_length=8, response_length=8, max_num_seqs=4)
        server.light = rollout.LightRollout()
        server.model, server.end_ids, server.global_steps, server._waiting = None, [], 1, []
        server._arrived, server._open, server._computing = asyncio.Event(), asyncio.Event(), asyncio.Lock()
        server._aborting, server._rejecting, server._serving = False, False, None
        server._open.set()

        def answer(prompt: int) -> Any:
            return asyncio.wait_for(server.generate([prompt], {"seed": 1}, "request-1"), 10)

        with pytest.raises(RuntimeError, match="no memory"):
            await answer(13)
        with pytest.raises(ValueError, match="shorter"):  # fewer answers than requests
            await answer(14)
        given_up = asyncio.create_task(answer(1))
        await asyncio.sleep(0.08)  # it is being computed
        given_up.cancel()
        assert (await answer(2)).token_ids == [7]

    asyncio.run(ask())


# ------------------------------------------------------------------------------------------------------------- data


def _row(**changed: Any) -> dict[str, Any]:
    row = {
        "prompt": [{"role": "user", "content": "1+1"}],
        "data_source": "x",
        "reward_model": {"style": "rule", "ground_truth": "2"},
    }
    return {**row, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": None}, "has no prompt"),
        ({"prompt": []}, "has no prompt"),
        ({"prompt": [{"role": "user", "content": None}]}, "has a message without 'content'"),
        ({"prompt": [{"role": None, "content": "1+1"}]}, "has a message without 'role'"),
        ({"prompt": [{"role": "system", "content": ""}, {"role": "user", "content": " "}]}, "has a prompt without any"),
        ({"reward_model": None}, "has no reward_model.ground_truth"),
        ({"reward_model": {"style": "rule", "ground_truth": " "}}, "has no reward_model.ground_truth"),
        ({"reward_model": {"style": "rule", "ground_truth": "nan"}}, "has the ground truth 'nan'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_before_ray_starts(
    compose: Callable[..., Any], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = tmp_path / "train.parquet"
    rows = [_row() for _ in range(3000)]
    rows[1234] = rows[2345] = _row(**changed)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    files = [f"data.train_files={path}", f"data.val_files={path}"]
    config = compose("+recipe=demo_cpu", *files)
    expected = rf"data.train_files: {path} row 1234 .from 0. {message}.*, and 1 more such rows. Leave it out"
    with pytest.raises(EntropyForkError, match=expected):
        check_before_training(config)
    if "reward_model" in changed:  # a reward of the user's own may like it
        check_before_training(compose("+recipe=demo_cpu", *files, "reward.custom_reward_function.path=mine.py"))


def test_another_reward_may_do_without_a_ground_truth(compose: Callable[..., Any], tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([_row(reward_model={"style": "model"})]), tmp_path / "train.parquet")
    files = [f"data.{split}_files={tmp_path}/train.parquet" for split in ("train", "val")]
    check_before_training(compose("+recipe=demo_cpu", *files, "reward.custom_reward_function.path=mine.py"))
    with pytest.raises(EntropyForkError, match=r"the column reward_model has no ground_truth, which pkg"):
        check_before_training(compose("+recipe=demo_cpu", *files))


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_file_that_was_damaged_is_not_read(compose: Callable[..., Any], tmp_path: Path, damage: str) -> None:
    """A byte in the middle of a page is changed. The checksums that 'entropy-fork data prepare' writes find it."""
    path = tmp_path / "train.parquet"
    rows = [_row(prompt=[{"role": "user", "content": f"{i} + {i}"}]) for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), path, write_page_checksum=True, compression="none")
    files = [f"data.{split}_files={path}" for split in ("train", "val")]
    check_before_training(compose("+recipe=demo_cpu", *files))
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[content.index(b"500 + 500")] ^= 1
    else:
        del content[-2000:]
    path.write_bytes(content)
    with pytest.raises(EntropyForkError, match=rf"data.train_files: {path} is not a readable parquet file"):
        check_before_training(compose("+recipe=demo_cpu", *files))


# -------------------------------------------------------------------------------------- an answer of 100,000 characters

LONG = 100_000


def test_a_long_answer_is_scored_by_verls_manager(compose: Callable[..., Any]) -> None:
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    answers = ["x" * LONG, r"\boxed{" * (LONG // 7), "(" * LONG + r"\boxed{2}", rf"\boxed{{{'1+' * (LONG // 2)}1}}"]

    class Tokenizer:
        def decode(self, ids: Any, skip_special_tokens: bool) -> str:
            return answers[int(ids[0])]

    config = compose("+recipe=demo_cpu", "reward.reward_kwargs.overlong_buffer_cfg.enable=false")

    async def score() -> list[Any]:
        manager = load_reward_manager(config, Tokenizer())
        rows = [
            DataProto.from_dict(
                {"responses": torch.tensor([[i]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)},
                {"data_source": np.array(["x"]), "reward_model": np.array([{"ground_truth": "2"}], dtype=object)},
            )
            for i in range(len(answers))
        ]
        return [await manager.run_single(row) for row in rows]

    begin = time.monotonic()
    scores = [result["reward_extra_info"]["acc"] for result in asyncio.run(score())]
    assert scores == [0, 0, 1, 0]
    assert time.monotonic() - begin < 10


def test_a_long_answer_is_dumped_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Tokenizer:
        eos_token_id = 0
        added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(chr(97 + number) for number in ids)

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [chr(97 + number) for number in ids]

    lengths, ids = torch.tensor([LONG]), torch.arange(LONG) % 26
    columns = {
        "prompts": jagged(torch.arange(2), torch.tensor([2])),
        "responses": jagged(ids, lengths),
        "response_mask": jagged(torch.ones(LONG), lengths),
        "entropy": jagged(torch.rand(LONG), lengths),
        "old_log_probs": jagged(-torch.rand(LONG), lengths),
        "rollout_is_weights": jagged((ids % 5 == 0).float(), lengths),
        "reward_model": [{"ground_truth": "2"}],
    }
    monkeypatch.setattr(tq, "kv_batch_get", lambda select_fields, **_: columns)
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {"actor": {"shuffle": False}, "model": {"path": "m"}, "rollout": {"temperature": 1.0}},
            "data": {"max_response_length": LONG},
            "trainer": {"default_local_dir": str(tmp_path)},
        }
    )
    fork_config = EntropyForkConfig(dump_every=1, dump_dir=str(tmp_path))
    dump = TokenDump(config, fork_config, masking_of(config, fork_config))
    dump.start()
    dump.write(SimpleNamespace(keys=["u_0_0"], tags=[{}], partition_id="train", fields=[*columns]), 1, Tokenizer())
    (answer,) = read_answers(tmp_path)
    assert len(answer.text) == LONG
    assert answer.truncated
    np.testing.assert_array_equal(answer.selected, (ids % 5 == 0).numpy())
