"""Sweeps, with a small Hydra application instead of main_ppo. e2e/test_sweep_run.py uses the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.sweeps import read
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from entropy_fork.common import processes
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.sweep import jobs as sweep
from entropy_fork.sweep import ray_cluster
from entropy_fork.sweep.ray_cluster import Usage, wait_until_free
from entropy_fork.verl.config import EntropyForkConfig

pytestmark = pytest.mark.process

# ---------------------------------------------------------------- names and folders


def config(name: str = "run", folder: str = "checkpoints/${trainer.experiment_name}", **other: Any) -> DictConfig:
    trainer = {"experiment_name": name, "default_local_dir": folder, "resume_mode": "auto", "rollout_data_dir": None}
    return OmegaConf.create({"trainer": trainer, **other})


@pytest.fixture(autouse=True)
def without_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    """In these tests, the jobs' configs have no hydra node."""
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.set_config", lambda self, cfg: None)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["entropy_fork.top_ratio=0.1"], "top_ratio=0.1"),
        (["entropy_fork=off", "data.seed=2"], "entropy_fork=off,seed=2"),
        (["+recipe=qwen3_8b_20k"], "recipe=qwen3_8b_20k"),
        (["data.seed=1", "actor_rollout_ref.rollout.seed=2"], "data.seed=1,actor_rollout_ref.rollout.seed=2"),
        ([], ""),
    ],
)
def test_a_job_is_called_by_what_makes_it_differ(overrides: list[str], name: str) -> None:
    assert sweep.short_form(overrides) == name


def test_names_are_file_names_and_stay_different() -> None:
    paths = [sweep.short_form([f"actor_rollout_ref.model.path={path}"]) for path in ("/a/b", "/a_b", "/a" * 200)]
    assert len(set(paths)) == 3
    assert not any("/" in path or len(path) > 110 for path in paths)
    assert sweep.short_form(["m.path=/a/b"]) == sweep.short_form(["m.path=/a/b"])


def test_what_was_swept() -> None:
    typed = ["entropy_fork.top_ratio=0.1,0.2", "+recipe=demo_cpu", "data.train_files=[a,b]", "~data.seed"]
    job = ["entropy_fork.top_ratio=0.2", "+recipe=demo_cpu", "data.train_files=[a,b]", "~data.seed", "lr=0.1"]
    assert sweep.swept_overrides(job, typed) == ["entropy_fork.top_ratio=0.2", "lr=0.1"]  # lr: a sweeper's own


def test_jobs_never_share_a_name_or_checkpoints() -> None:
    configs = [config(), config()]
    for each in configs:
        each.entropy_fork = EntropyForkConfig()  # the folder of its tokens is below the checkpoints by default
    changes = sweep.Places().own(configs, ["top_ratio=0.1", "top_ratio=0.2"])
    assert changes[0] == {"trainer.experiment_name": "run-top_ratio=0.1"}  # the folder of checkpoints follows from it
    assert [c.trainer.default_local_dir for c in configs] == [
        "checkpoints/run-top_ratio=0.1",
        "checkpoints/run-top_ratio=0.2",
    ]


def test_a_fixed_folder_gets_one_below_it_per_job() -> None:
    configs = [config(folder="/ckpt"), config(folder="/ckpt")]
    for each in configs:
        each.trainer.rollout_data_dir = "/rollouts"
        each.entropy_fork = {"dump_dir": "/tokens"}
    sweep.Places().own(configs, ["a=1", "a=2"])
    assert [c.trainer.default_local_dir for c in configs] == ["/ckpt/a=1", "/ckpt/a=2"]
    assert [c.trainer.rollout_data_dir for c in configs] == ["/rollouts/a=1", "/rollouts/a=2"]
    assert [c.entropy_fork.dump_dir for c in configs] == ["/tokens/a=1", "/tokens/a=2"]


def test_what_the_user_made_different_is_left_alone() -> None:
    configs = [config("r0.1", folder="/ckpt/0.1"), config("r0.2", folder="/ckpt/0.2")]
    assert sweep.Places().own(configs, ["top_ratio=0.1", "top_ratio=0.2"]) == [{}, {}]


def test_different_in_one_batch_and_the_same_over_two() -> None:
    places = sweep.Places()
    assert places.own([config("r1"), config("r2")], ["a=1,s=1", "a=2,s=1"]) == [{}, {}]
    second = places.own([config("r1"), config("r2")], ["a=1,s=2", "a=2,s=2"])
    assert [change["trainer.experiment_name"] for change in second] == ["r1-a=1,s=2", "r2-a=2,s=2"]


def test_batches_of_one_and_the_same_job_twice() -> None:
    places = sweep.Places()
    names = [places.own([config()], [form])[0]["trainer.experiment_name"] for form in ("a=1", "a=2", "a=2")]
    assert names == ["run-a=1", "run-a=2", "run-a=2-2"]


def test_a_job_with_nothing_swept_is_a_single_run() -> None:
    assert sweep.Places().own([config()], [""]) == [{}]


def test_it_says_which_checkpoint_a_job_goes_on_from(tmp_path: Path) -> None:
    job = config(folder=str(tmp_path))
    assert sweep.continues_from(job) is None
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    assert sweep.continues_from(job) == str(tmp_path / "global_step_40")
    job.trainer.resume_mode = "disable"
    assert sweep.continues_from(job) is None


def test_loggers_that_take_their_place_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "/logs/all.jsonl")
    assert sweep.own_environment("a=1") == {"VERL_FILE_LOGGER_PATH": "/logs/all-a=1.jsonl"}
    assert sweep.own_environment("") == {}


def test_the_command_of_a_job_is_that_of_a_single_run() -> None:
    hydra = ["hydra.mode=MULTIRUN", "hydra.launcher.patience_s=5", "hydra/launcher=entropy_fork", "hydra.run.dir=x"]
    line = sweep.command(
        ["python", "-m", "verl.trainer.main_ppo"],
        [*hydra, "hydra.sweep.dir=s", "hydra.verbose=true"],
        ["+recipe=demo_cpu", "trainer.experiment_name=run", "a=1"],
        {"trainer.experiment_name": "run-it's", "hydra.run.dir": Path("/s/0"), "hydra.job.num": 0},
    )
    assert line[3:] == [
        "hydra.verbose=true", "+recipe=demo_cpu", "a=1", r"trainer.experiment_name='run-it\'s'",
        "hydra.run.dir='/s/0'", "hydra.job.num='0'", "hydra.mode=RUN",
    ]  # fmt: skip


# ---------------------------------------------------------------- a whole sweep of a small application

APPLICATION = """
import os, pathlib, signal, subprocess, sys, time
import hydra
from hydra.core.config_store import ConfigStore

trainer = {"experiment_name": "run", "resume_mode": "auto",
           "default_local_dir": "checkpoints/${trainer.experiment_name}"}
node = {"do": "train", "ratio": 1.0, "num": "${hydra:job.num}", "trainer": trainer}
ConfigStore.instance().store(name="application", node=node)

@hydra.main(config_path=None, config_name="application", version_base=None)
def main(config):
    assert "LEFT_BEHIND" not in os.environ  # as run_ppo leaves VERL_FULL_DETERMINISM and PYTHONHASHSEED
    os.environ["LEFT_BEHIND"] = "1"
    checkpoint = pathlib.Path(config.trainer.default_local_dir) / "latest_checkpointed_iteration.txt"
    print("resumed" if checkpoint.exists() else "from scratch", "as job", config.num)
    print("\\x1b[36m(TaskRunnerV1 pid=7)\\x1b[0m step:0 - val-core/math/acc/mean@2:np.float64(0.125)")
    print("\\x1b[36m(TaskRunnerV1 pid=7)\\x1b[0m ValueError: a worker's, which was caught")
    if config.do == "raise":
        raise ValueError("this one fails")
    if config.do == "exit":
        sys.exit("a message and no traceback")
    if config.do == "crash":
        program = "import time; time.sleep(300)"
        daemon = [sys.executable, "-c", program, os.path.abspath("left_behind")]  # in its own session, as Ray's are
        subprocess.Popen(daemon, start_new_session=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if config.do == "wait":
        print("waiting")
        time.sleep(300)
    print("(TaskRunnerV1 pid=7) step:1 - entropy_fork/kept_ratio:0.2001 - val-core/math/acc/mean@2:np.float64(0.5)"
          " - val-core/aime/acc/mean@2:0.25 - val-core/aime/acc/best@2/mean:1.0")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text("1")

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def application(tmp_path: Path) -> list[str]:
    """The command of a Hydra application that behaves like main_ppo, without verl."""
    (tmp_path / "application.py").write_text(APPLICATION)
    return [str(tmp_path / "application.py"), "-m", "hydra/launcher=entropy_fork", "hydra.sweep.dir=sweep"]


def test_the_next_job_goes_on_when_one_fails(
    application: list[str], python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = python(
        *application, "do=train,raise,exit,crash", "hydra.sweep.subdir=${hydra.job.num}_x", "hydra.launcher.grace_s=1"
    )
    assert result.returncode == 1, result.stdout + result.stderr
    rows = read(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["finished", "failed", "failed", "failed"]

    # no name, checkpoint or environment is shared, and the folder is Hydra's
    assert [row["experiment_name"] for row in rows] == [f"run-do={do}" for do in ("train", "raise", "exit", "crash")]
    for number, row in enumerate(rows):
        directory = tmp_path / "sweep" / f"{number}_x"
        assert row["directory"] == str(directory)
        assert f"from scratch as job {number}\n" in (directory / "output.log").read_text()
        assert (directory / ".hydra" / "overrides.yaml").is_file()

    # the last metrics of each job, the average over the benchmarks, and the reason of each failure
    assert (rows[0]["accuracy"], rows[0]["accuracy_step"], rows[0]["kept_ratio"]) == ("0.375", "1", "0.2001")
    assert (rows[1]["accuracy"], rows[1]["accuracy_step"], rows[1]["kept_ratio"]) == ("0.125", "0", "")
    assert rows[0]["val-core/aime/acc/mean@2"] == "0.25"
    assert "val-core/aime/acc/best@2/mean" not in rows[0]
    assert rows[1]["error"] == "ValueError: this one fails"
    assert rows[2]["error"] == "a message and no traceback"
    assert rows[3]["error"].startswith("killed by SIGKILL (out of memory?)")
    assert f"job 1 failed: ValueError: this one fails\n  its output: {tmp_path}/sweep/1_x/output.log" in result.stdout
    assert "3 of 4 jobs failed" in result.stderr
    assert not _running(str(tmp_path / "left_behind"))


def test_the_same_sweep_again_goes_on_from_its_own_checkpoints(
    application: list[str], python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert python(*application, "ratio=0.1,1.0").returncode == 0
    result = python(*application, "ratio=0.1,0.2")
    assert result.returncode == 0, result.stderr
    assert "resumed as job 0\n" in result.stdout
    assert "from scratch as job 1\n" in result.stdout
    assert "goes on from checkpoints/run-ratio=0.1/global_step_1 (trainer.resume_mode=disable" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_job_and_the_sweep(application: list[str], tmp_path: Path, number: int) -> None:
    """SIGTERM too: a sweep in the background of a shell script ignores SIGINT, and so do its children."""
    hearing = "--ignore-signal=INT" if number == signal.SIGTERM else "--default-signal=INT"
    command = ["env", hearing, sys.executable, *application, "do=train,wait,raise"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if line == "waiting\n":
            process.send_signal(number)
    assert process.wait(120) == 130
    rows = read(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["finished", "interrupted", "not run"]
    assert "do=wait" in seen.partition("overrides")[2], "no table"
    assert "KeyboardInterrupt" in (tmp_path / "sweep" / "1" / "output.log").read_text(), "it was killed"
    assert not _running(str(tmp_path / "application.py"))


def _running(argument: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if argument in line and int(folder.name) != os.getpid():
            found.append(line)
    return found


def test_a_job_ends_with_a_sweep_that_is_killed(application: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *application, "do=wait"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert any(line == "waiting\n" for line in process.stdout)
    process.kill()
    process.wait(10)
    deadline = time.monotonic() + 60
    while _running(str(tmp_path / "application.py")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _running(str(tmp_path / "application.py"))


def test_a_closed_terminal_does_not_stop_the_jobs(application: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *application, "do=train", "ratio=0.1,0.2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    process.wait(120)
    rows = read(tmp_path / "sweep")
    assert [(row["status"], row["kept_ratio"]) for row in rows] == [("finished", "0.2001")] * 2
    assert "as job 1" in (tmp_path / "sweep" / "1" / "output.log").read_text()


def test_a_process_that_a_job_left_behind_is_ended() -> None:
    process = subprocess.Popen(["sleep", "300"], env={**os.environ, sweep.MARK: "mine"})
    other = subprocess.Popen(["sleep", "300"], env={**os.environ, sweep.MARK: "theirs"})
    try:
        deadline = time.monotonic() + 10
        while not processes.processes_with(sweep.MARK, "theirs") and time.monotonic() < deadline:
            time.sleep(0.05)  # until it is sleep's environment
        assert processes.processes_with(sweep.MARK, "theirs") == [other.pid]
        processes.end_processes(sweep.MARK, "mine", grace_s=0.5)
        assert process.wait(5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        process.kill()
        other.kill()
        process.wait()
        other.wait()


def test_a_process_that_was_just_being_started_is_found_by_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between fork and exec, a process cannot be found by its environment. And a process may print for ever."""
    process = subprocess.Popen(["sleep", "300"], env={**os.environ, sweep.MARK: "mine"}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    reader = threading.Thread(target=process.stdout.read, daemon=True)
    reader.start()
    looks, real = iter([[]]), processes.processes_with
    monkeypatch.setattr(
        processes, "processes_with", lambda *mark: next(looks) if looks.__length_hint__() else real(*mark)
    )
    try:
        sweep._end("mine", 0, reader)
        assert process.wait(5) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# ---------------------------------------------------------------- when it is chosen


@pytest.mark.parametrize(
    ("arguments", "launcher"),
    [
        (["-m", "+recipe=dapo", "a=1,2"], "entropy_fork"),
        (["--config-name=ppo_megatron_trainer", "entropy_fork.top_ratio=0.1,0.2", "--multirun"], "entropy_fork"),
        (["+entropy_fork=global,off", "hydra.mode=MULTIRUN"], "entropy_fork"),
        (["+recipe=dapo", "a=1"], "basic"),
        (["--cfg", "job", "+recipe=dapo"], "basic"),
        (["-m", "a=1,2"], "basic"),  # nothing of ours: as in stock verl
    ],
)
def test_the_launcher_is_the_default_of_sweeps_alone(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], launcher: str
) -> None:
    from hydra_plugins.entropy_fork.launcher import make_default

    store = ConfigStore.instance()
    before = store.repo["hydra"]["config.yaml"]
    monkeypatch.setattr(sys, "argv", ["main_ppo.py", *arguments])
    try:
        make_default()
        assert (store.repo["hydra"]["config.yaml"] is before) == (launcher == "basic")
        defaults = store.load("hydra/config.yaml").node.defaults
        assert {"launcher": launcher} in defaults
        assert len(defaults) == len(before.node.defaults)
    finally:
        store.repo["hydra"]["config.yaml"] = before


# ---------------------------------------------------------------- an existing Ray cluster

BEFORE = Usage({"CPU": 32.0, "GPU": 8.0}, ["serve/proxy"])


def answering(monkeypatch: pytest.MonkeyPatch, free: dict[str, float], actors: list[str]) -> None:
    monkeypatch.setattr(ray_cluster, "_ask", lambda *_, **__: {"free": free, "actors": actors})


def test_a_free_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {"CPU": 40.0, "GPU": 8.0}, [])
    assert wait_until_free("host:1", BEFORE, accelerators=8, patience_s=1) is None


def test_a_cluster_that_others_use_too(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {"CPU": 32.0, "GPU": 6.0}, ["serve/proxy"])
    assert wait_until_free("host:1", BEFORE, accelerators=4, patience_s=1) == "6 of 8 GPU free"


@pytest.mark.parametrize(
    ("free", "actors", "reason"),
    [
        ({"CPU": 32.0, "GPU": 4.0}, [], "4 of 8 GPU free"),
        ({"CPU": 32.0}, [], "0 of 8 GPU free"),
        ({"CPU": 32.0, "GPU": 8.0}, ["transfer_queue/TransferQueueController"], "still there: transfer_queue/Transfer"),
    ],
)
def test_a_cluster_that_does_not_get_free(
    monkeypatch: pytest.MonkeyPatch, free: dict[str, float], actors: list[str], reason: str
) -> None:
    answering(monkeypatch, free, actors)
    with pytest.raises(EntropyForkError, match=f"not free 60 s after the job before: {reason}.*patience_s=SECONDS"):
        wait_until_free("host:1", BEFORE, accelerators=8, patience_s=60)


def test_which_cluster_ray_would_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = {"_temp_dir": str(tmp_path)}  # if no 'ray start' has left an address
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_cluster.find_cluster(own) is None
    assert ray_cluster.find_cluster({**own, "address": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    assert ray_cluster.find_cluster({**own, "address": "ray://head:10001"}) == "ray://head:10001"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert ray_cluster.find_cluster(own) == "10.0.0.2:6379"
    assert ray_cluster.find_cluster({**own, "address": "local"}) is None
