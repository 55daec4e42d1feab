"""A checkpoint records what it was trained on, and a run of another selection does not resume from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.verl.checks import check_before_training
from entropy_fork.verl.config import EntropyForkConfig
from entropy_fork.verl.guards.checkpoint import WholeCheckpoints

Compose = Callable[..., Any]
Line = list[str]

FILE = "entropy_fork.json"
LATEST = "latest_checkpointed_iteration.txt"


class Stock:
    """The part of verl's trainer for its folders. ``_load_checkpoint``, as in verl 0.9.1, returns where it resumes."""

    use_critic = False

    def __init__(self, config: Any):
        self.config, self.global_steps, self.resumed = config, 0, 0
        self.actor_rollout_wg = SimpleNamespace(workers=[])

    def _save_checkpoint(self) -> None:
        root = Path(self.config.trainer.default_local_dir)
        (root / f"global_step_{self.global_steps}").mkdir(parents=True, exist_ok=True)
        (root / LATEST).write_text(str(self.global_steps))

    def _load_checkpoint(self) -> None:
        from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

        trainer = self.config.trainer
        folder = {
            "disable": None,
            "auto": find_latest_ckpt_path(trainer.default_local_dir),
            "resume_path": trainer.resume_from_path,
        }[trainer.resume_mode]
        self.resumed = int(folder.split("global_step_")[-1]) if folder else 0


class Trainer(WholeCheckpoints, Stock): ...


COMPOSED: dict[tuple[str, ...], Any] = {}


@pytest.fixture
def line(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A user's command line, run in an empty folder. Checkpoints go to verl's default folder."""
    monkeypatch.chdir(tmp_path)

    def composed(*words: str) -> Any:
        groups = tuple(word for word in words if word.startswith("+"))
        if groups not in COMPOSED:  # Hydra takes a second
            COMPOSED[groups] = compose(*groups)
        keys = OmegaConf.from_dotlist([word for word in words if word not in groups])
        return OmegaConf.merge(COMPOSED[groups], keys)

    return composed


def train(config: Any, step: int = 1) -> Path:
    """Make a run that saves a checkpoint. Returns the checkpoint's folder."""
    check_before_training(config)
    trainer = Trainer(config)
    trainer._load_checkpoint()
    trainer.global_steps = step
    trainer._save_checkpoint()
    return Path(config.trainer.default_local_dir).absolute() / f"global_step_{step}"


def resume(config: Any) -> int:
    """The step from which a run resumes. Neither the launcher nor the trainer refuses it."""
    check_before_training(config)
    trainer = Trainer(config)
    trainer._load_checkpoint()
    return trainer.resumed


def refused(config: Any, match: str) -> None:
    """The launcher refuses, and so does the trainer, for users with their own launcher."""
    for start in (check_before_training, lambda config: Trainer(config)._load_checkpoint()):
        with pytest.raises(EntropyForkError, match=match):
            start(config)


OFF = ["+entropy_fork=off"]
GLOBAL = ["+entropy_fork=global"]


def test_off_does_not_take_the_masked_model_for_its_own(line: Callable[..., Any], tmp_path: Path) -> None:
    """The reported case: all steps are done, so the run would end without an error."""
    folder = train(line(*GLOBAL, "trainer.total_training_steps=1"))
    baseline = [*OFF, "trainer.total_training_steps=1"]
    refused(
        line(*baseline),
        rf"{folder} was trained on the tokens of top_ratio=0.2 select=top, but this run trains on all tokens.*"
        r"trainer.experiment_name=NAME for a separate run, trainer.resume_mode=disable.*"
        r"or entropy_fork.resume_other_selection=true to resume from that checkpoint on purpose",
    )
    # each remedy in the message works
    assert resume(line(*baseline, "trainer.experiment_name=baseline")) == 0
    assert resume(line(*baseline, "trainer.resume_mode=disable")) == 0
    assert resume(line(*baseline, "entropy_fork.resume_other_selection=true")) == 1
    assert resume(line(*GLOBAL)) == 1
    assert resume(line()) == 1, "a line without our node is verl's own"
    refused(
        line(*GLOBAL, "entropy_fork.top_ratio=0.1"), r"tokens of top_ratio=0.2 .* tokens of top_ratio=0.1 select=top"
    )


def test_a_baseline_is_not_resumed_with_a_mask(line: Callable[..., Any]) -> None:
    folder = train(line(*OFF))
    assert json.loads((folder / FILE).read_text()) == {"trained_on": "all tokens"}
    refused(line(*GLOBAL), r"was trained on all tokens, but this run trains on the tokens of top_ratio=0.2 select=top:")
    assert resume(line(*GLOBAL, "entropy_fork.top_ratio=1.0")) == 1, "which is the update of all tokens, bit for bit"


def test_a_path_to_resume_from(line: Callable[..., Any]) -> None:
    folder = train(line(*GLOBAL, "trainer.experiment_name=masked"))
    path = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder}", "trainer.experiment_name=other"]
    refused(line(*OFF, *path), rf"{folder} was trained on.*experiment_name=NAME for .* and trainer.resume_mode=auto,")
    relative = ["trainer.resume_from_path=checkpoints/verl_examples/masked/global_step_1", *path[::2]]
    refused(line(*OFF, *relative), rf"{folder} was trained on")
    assert resume(line(*GLOBAL, *path)) == 1


def test_a_folder_that_does_not_follow_from_the_name(line: Callable[..., Any], tmp_path: Path) -> None:
    folder = [f"trainer.default_local_dir={tmp_path / 'here'}"]
    train(line(*GLOBAL, *folder))
    refused(
        line(*OFF, *folder), "trainer.experiment_name=NAME for a separate run and trainer.default_local_dir=FOLDER,"
    )


#: what changes the selection, with the keys that it needs
OTHERS = [
    ["top_ratio=0.1"],
    ["select=bottom"],
    ["select=random"],
    ["select=random", "seed=1"],
    ["select=band", "band_from=0.1"],
    ["select=band", "band_from=0.05"],
    ["entropy=current"],
    ["pool=batch"],
    ["ties=threshold"],
    ["denominator=all"],
    ["weight=soft"],
    ["schedule=linear", "schedule_steps=10"],
    ["schedule=cosine", "schedule_steps=10"],
    ["schedule=linear", "schedule_steps=20"],
    ["schedule=linear", "schedule_steps=10", "final_ratio=0.5"],
    ["score=surprisal"],
    ["where='advantage > 0'"],
    ["where='advantage > 0'", "outside=keep"],
    ["control=matched_random"],
    ["control=matched_random", "seed=2"],
    ["use=weight"],
    ["use=weight", "normalize=none"],
    ["use=weight", "map=exponential", "map_rate=-2"],
    ["use=weight", "map_slope=2", "map_offset=1"],
    ["use=weight", "map=clipped", "map_low=0.5", "map_high=1.5"],
    ["use=advantage"],
    ["use=advantage", "combine=add"],
    ["use=advantage", "combine=add", "add_limit=3"],
    ["use=clip"],
    ["enabled=false"],
]
#: what does not change it
SAME = [
    ["sparse_head=false"],
    ["dump_every=5", "dump_answers=2", "dump_dir=tokens"],
    ["resume_other_selection=false"],
    ["short_output=false"],
    ["seed=3"],
    ["final_ratio=0.7"],
    ["schedule_steps=7"],
    ["observe=[surprisal]"],
    ["map_slope=3", "combine=add", "outside=keep"],
]


@pytest.mark.parametrize("keys", OTHERS, ids=" ".join)
def test_every_key_that_selects_is_part_of_the_selection(line: Callable[..., Any], keys: Line) -> None:
    train(line(*GLOBAL))
    words = [f"entropy_fork.{key}" for key in keys]
    refused(line(*GLOBAL, *words), r"was trained on .*, but this run trains on ")
    assert resume(line(*GLOBAL, *words, "entropy_fork.resume_other_selection=true")) == 1
    again = line(*GLOBAL, *words, "trainer.experiment_name=other")
    train(again)
    assert resume(again) == 1


def test_selections_are_told_apart(line: Callable[..., Any]) -> None:
    folder = train(line(*GLOBAL))
    assert len({json.dumps(selection_of(line, keys)) for keys in OTHERS}) == len(OTHERS)
    assert json.loads((folder / FILE).read_text())["trained_on"] == selection_of(line, [])


def selection_of(line: Callable[..., Any], keys: Line) -> Any:
    node = OmegaConf.to_object(line(*GLOBAL, *[f"entropy_fork.{key}" for key in keys]).entropy_fork)
    assert isinstance(node, EntropyForkConfig)
    return node.selection()


@pytest.mark.parametrize("keys", SAME, ids=" ".join)
def test_what_changes_nothing_of_the_selection_may_change(line: Callable[..., Any], keys: Line) -> None:
    train(line(*GLOBAL))
    assert resume(line(*GLOBAL, *[f"entropy_fork.{key}" for key in keys])) == 1


def test_every_key_of_the_node_is_one_or_the_other() -> None:
    """For a new key, decide here whether it changes the selection."""
    named = {key.split("=")[0] for keys in (*OTHERS, *SAME) for key in keys}
    assert named == set(EntropyForkConfig.__dataclass_fields__)


def test_a_checkpoint_that_does_not_say_is_taken_with_a_line_in_the_log(
    line: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """That is the case for stock verl, and for earlier versions of this package."""
    folder = train(line())
    assert not (folder / FILE).exists(), "a line without our node is verl's own"
    for words in (GLOBAL, OFF):
        capsys.readouterr()
        assert resume(line(*words)) == 1
        assert re.findall(r"entropy_fork: .*", capsys.readouterr().out) == [
            f"entropy_fork: {folder} does not say which tokens it was trained on (stock verl's checkpoints never do); "
            f"this run continues from it"
        ]
    capsys.readouterr()
    assert resume(line()) == 1
    assert "entropy_fork" not in capsys.readouterr().out


def test_a_key_that_an_earlier_version_did_not_know_had_its_default(line: Callable[..., Any]) -> None:
    folder = train(line(*GLOBAL))
    content = json.loads((folder / FILE).read_text())
    del content["trained_on"]["weight"]
    (folder / FILE).write_text(json.dumps(content))
    assert resume(line(*GLOBAL)) == 1
    refused(line(*GLOBAL, "entropy_fork.weight=soft"), "was trained on")
    content["trained_on"]["of_a_later_version"] = 1
    (folder / FILE).write_text(json.dumps(content))
    refused(line(*GLOBAL), "of_a_later_version=1")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"trained_on": 3}'])
def test_a_file_that_cannot_be_read(line: Callable[..., Any], content: str) -> None:
    folder = train(line(*GLOBAL))
    (folder / FILE).write_text(content)
    refused(line(*GLOBAL), rf"{folder / FILE} cannot be read \(.*trainer.resume_mode=disable")


def test_it_is_written_before_verl_points_to_the_checkpoint(line: Callable[..., Any], tmp_path: Path) -> None:
    """A run killed anywhere in a save never leaves a checkpoint to resume from without the file."""

    class Killed(BaseException): ...

    def die(this: Stock) -> None:
        folder = Path(this.config.trainer.default_local_dir) / "global_step_1"
        assert (folder / FILE).exists()
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stock, "_save_checkpoint", die)
        trainer = Trainer(line(*GLOBAL))
        trainer.global_steps = 1
        with pytest.raises(Killed):
            trainer._save_checkpoint()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [FILE], "and no half of it beside it"


def test_the_guards_do_not_matter(line: Callable[..., Any]) -> None:
    """This check belongs to the mask, because a wrong baseline is a wrong result."""
    guards = ["+entropy_fork_guards=off"]
    train(line(*GLOBAL, *guards))
    refused(line(*OFF, *guards), "was trained on")


def test_a_run_without_the_node_that_saves_over_a_checkpoint_removes_what_is_no_longer_true(
    line: Callable[..., Any],
) -> None:
    """Else the next masked run would resume from a model of all tokens as if it were its own."""
    folder = train(line(*GLOBAL))
    assert train(line("trainer.resume_mode=disable")) == folder
    assert not (folder / FILE).exists()


@pytest.mark.parametrize("first", [OFF, []])
def test_a_checkpoint_that_was_half_written_over_is_of_neither_selection(line: Callable[..., Any], first: Line) -> None:
    """verl already points to it. Without the guard ``checkpoints`` nothing else shows that it is not whole."""

    class Killed(BaseException): ...

    def die(this: Stock) -> None:
        raise Killed

    folder = train(line(*first))
    again = line(*GLOBAL, "trainer.resume_mode=disable")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stock, "_save_checkpoint", die)
        with pytest.raises(Killed):
            train(again)
    refused(line(*GLOBAL), "was trained on tokens of two selections")
    refused(line(*OFF), "was trained on tokens of two selections")
    train(again)
    assert json.loads((folder / FILE).read_text())["trained_on"]["top_ratio"] == 0.2
    assert resume(line(*GLOBAL)) == 1
