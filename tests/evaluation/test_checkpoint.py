"""Which folder an evaluation takes for its model, and what it knows about it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.evaluations import QUIET
from rich.console import Console
from typer.testing import CliRunner

from entropy_fork.cli import app
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.evaluation import evaluate as evaluation
from entropy_fork.evaluation.checkpoint import MERGED_FROM, Checkpoint, ModelRecord

SELECTION = {"top_ratio": 0.1, "select": "top", "pool": "batch", "ties": "exact"}


def step(run: Path, number: int, *, actor: bool = True, unfinished: bool = False, selection: str | None = None) -> Path:
    """A checkpoint of one rank that is found but cannot be loaded."""
    folder = run / f"global_step_{number}"
    (folder / "actor").mkdir(parents=True) if actor else folder.mkdir(parents=True)
    if actor:
        (folder / "actor" / "fsdp_config.json").write_text('{"world_size": 1}')
        (folder / "actor" / "model_world_size_1_rank_0.pt").touch()
    if unfinished:
        (folder / "unfinished").touch()
    if selection is not None:
        (folder / "entropy_fork.json").write_text(selection)
    return folder / "actor"


def test_a_run_stands_for_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    wanted = step(tmp_path, 9)  # before 10 in numbers, behind it in letters
    step(tmp_path, 2)
    step(tmp_path, 10, unfinished=True)
    step(tmp_path, 11, actor=False)
    (tmp_path / "global_step_99.txt").touch()
    found = Checkpoint.find(tmp_path)
    assert (found.path, found.step) == (wanted, 9)
    gone, unfinished, chosen = found.notes
    assert re.search(r"global_step_11 is left out: it has no folder actor", gone)
    assert re.search(r"global_step_10 is left out: it is not finished", unfinished)
    assert chosen == f"{wanted.parent} is the newest whole checkpoint in {tmp_path}"


def test_a_checkpoint_that_verl_did_not_finish_is_not_the_newest(tmp_path: Path) -> None:
    """verl names a step in its file after it has written the checkpoint, whether our guard is on or off."""
    step(tmp_path, 1)
    wanted = step(tmp_path, 2)
    step(tmp_path, 3)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    found = Checkpoint.find(tmp_path)
    assert found.path == wanted
    assert "global_step_3 is left out: " in found.notes[0]
    assert "latest_checkpointed_iteration.txt names step 2" in found.notes[0]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("77")  # its checkpoint was deleted
    assert Checkpoint.find(tmp_path).step == 3


def test_a_run_without_a_whole_checkpoint_is_one_error_that_names_each(tmp_path: Path) -> None:
    step(tmp_path, 1, actor=False)
    step(tmp_path, 2, unfinished=True)
    with pytest.raises(EntropyForkError) as error:
        Checkpoint.find(tmp_path)
    assert f"{tmp_path} has no whole checkpoint:\n" in str(error.value)
    assert [line.split(" is left out")[0][-1] for line in str(error.value).splitlines()[1:]] == ["2", "1"]
    for name in ("global_step_2", "global_step_2/actor"):
        with pytest.raises(EntropyForkError, match=r"global_step_2 is not finished"):
            Checkpoint.find(tmp_path / name)


def test_each_way_to_name_a_checkpoint_finds_the_same(tmp_path: Path) -> None:
    actor = step(tmp_path, 30, selection=json.dumps({"trained_on": SELECTION}))
    found = Checkpoint.find(actor)
    assert found == Checkpoint.find(actor.parent)
    assert found.record == Checkpoint.find(tmp_path).record == ModelRecord(str(actor.resolve()), 30, SELECTION)
    link = tmp_path / "link"
    link.symlink_to(actor.parent)
    assert Checkpoint.find(link).record.path == str(actor.resolve())


@pytest.mark.parametrize("content", ["{", "[]", '{"trained_on": 3}'])
def test_an_unreadable_record_of_the_selection_is_said(tmp_path: Path, content: str) -> None:
    found = Checkpoint.find(step(tmp_path, 1, selection=content))
    assert found.trained_on is None
    assert re.search(r"entropy_fork\.json cannot be read \(.+\), so the results do not say", found.notes[0])


def test_a_merged_folder_remembers_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(_: Checkpoint, target: Path) -> None:
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").touch()

    monkeypatch.setattr(Checkpoint, "_run_merger", merge)
    found = Checkpoint.find(step(tmp_path / "run", 7, selection='{"trained_on": "all tokens"}'))
    folder = found.merge(tmp_path / "merged")
    again = Checkpoint.find(folder)
    assert (again.backend, again.step, again.trained_on) == ("huggingface", 7, "all tokens")
    (folder / MERGED_FROM).write_text("{")
    assert Checkpoint.find(folder).record == ModelRecord(str(folder.resolve()))


def test_the_selection_in_words_names_what_is_not_a_default() -> None:
    assert ModelRecord("x", 1, SELECTION).trained_on_in_words() == "top_ratio=0.1 select=top pool=batch"
    assert ModelRecord("x", 1, "all tokens").trained_on_in_words() == "all tokens"
    assert ModelRecord("x").trained_on_in_words() == "not recorded"
    record = ModelRecord("x", 1, SELECTION)
    assert ModelRecord.of_dict(json.loads(json.dumps(record.as_dict()))) == record
    assert ModelRecord.of_dict({"step": 1}) is None


def test_every_result_says_which_model_it_is_of(
    model: Path,
    data: Path,
    settings: Callable[..., evaluation.EvaluationSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    (run / "global_step_4").mkdir(parents=True)
    (run / "global_step_4" / "actor").symlink_to(model)
    (run / "global_step_4" / "entropy_fork.json").write_text(json.dumps({"trained_on": SELECTION}))
    step(run, 5, unfinished=True)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("LINES", "50")
    arguments = ["evaluate", str(run), "--data", str(data), "--output", str(tmp_path / "out"), "--answers", "1"]
    result = CliRunner().invoke(app, [*arguments, "--max-tokens", "8", "--engine", "transformers"])
    assert result.exit_code == 0, result.output
    assert "global_step_5 is left out: it is not finished" in result.output
    assert f"{run / 'global_step_4'} is the newest whole checkpoint in {run}" in result.output

    expected = {"path": str(model.resolve()), "step": 4, "trained_on": SELECTION}
    for name in ("results.json", "manifest.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["model"] == expected
    row = f"| {model.resolve()} | 4 | top_ratio=0.1 select=top pool=batch |"
    assert row in (tmp_path / "out" / "results.md").read_text()
    assert re.search(rf"{re.escape(str(model.resolve()))} +│ +4 │ top_ratio=0.1 select=top pool=batch", result.output)

    plain = evaluation.evaluate(settings(answers=1, output=tmp_path / "plain"), QUIET)
    assert plain.model == ModelRecord(str(model.resolve()))


def test_a_run_that_went_on_is_refused_with_both_folders(
    model: Path, settings: Callable[..., evaluation.EvaluationSettings], tmp_path: Path
) -> None:
    """The same command again, after the run has written another checkpoint."""
    (tmp_path / "run").mkdir()
    shutil.copytree(model, tmp_path / "run" / "global_step_1" / "actor")
    evaluation.evaluate(settings(model=tmp_path / "run", answers=1), QUIET)
    shutil.copytree(model, tmp_path / "run" / "global_step_2" / "actor")
    (tmp_path / "run" / "global_step_2" / "actor" / "generation_config.json").write_text('{"eos_token_id": 0}')
    with pytest.raises(EntropyForkError, match="must not be mixed") as error:
        evaluation.evaluate(settings(model=tmp_path / "run", answers=1), Console(quiet=True))
    (line,) = [line for line in str(error.value).splitlines() if line.startswith("  model: ")]
    assert re.search(r"global_step_1/actor\)' there, '.*global_step_2/actor\)' now", line)
