"""A model without a tokenizer, and a tokenizer from another folder, with both engines."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers.evaluations import QUIET, lines
from typer.testing import CliRunner

from entropy_fork.cli import app
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.evaluation import evaluate as evaluation
from entropy_fork.evaluation.checkpoint import Checkpoint
from entropy_fork.evaluation.engines import SamplingSettings, VllmEngine

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WAY_OUT = "copy the tokenizer's files there, or name a folder that has them with --tokenizer FOLDER"

Settings = Callable[..., evaluation.EvaluationSettings]


@pytest.fixture
def bare(model: Path, tmp_path: Path) -> Path:
    """The model without its tokenizer."""
    return shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns(*TOKENIZER))


@pytest.fixture
def apart(model: Path, tmp_path: Path) -> Path:
    """The tokenizer without its model."""
    (tmp_path / "apart").mkdir()
    for name in TOKENIZER:
        shutil.copy(model / name, tmp_path / "apart")
    return tmp_path / "apart"


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "TransformersEngine", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr(Checkpoint, "_run_merger", lambda *_: pytest.fail("shards were merged"))


def test_a_model_without_a_tokenizer_is_named_before_its_weights_are_loaded(
    bare: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights(monkeypatch)
    arguments = ["evaluate", str(bare), "--data", str(data), "--output", str(tmp_path / "out"), "--max-tokens", "8"]
    result = CliRunner().invoke(app, [*arguments, "--engine", "transformers"])
    assert result.exit_code == 1
    assert result.stderr.endswith(f"error: {bare} has no tokenizer: {WAY_OUT}\n")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'},
            r"has no vocabulary \(there is tokenizer_config\.json\)",
        ),
        ({"tokenizer.json": "{"}, r"cannot be read \(.+\)"),
    ],
)
def test_a_part_of_a_tokenizer_is_named_too(
    bare: Path, settings: Settings, files: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights(monkeypatch)
    for name, content in files.items():
        (bare / name).write_text(content)
    with pytest.raises(EntropyForkError, match=f"the tokenizer in {bare} {message}: copy the tokenizer's files there"):
        evaluation.evaluate(settings(model=bare), QUIET)


def test_a_sharded_checkpoint_without_a_tokenizer_is_not_merged_first(
    bare: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights(monkeypatch)
    actor = tmp_path / "global_step_1" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "fsdp_config.json").write_text('{"world_size": 1}')
    (actor / "model_world_size_1_rank_0.pt").touch()
    shutil.copy(bare / "config.json", actor / "huggingface")
    with pytest.raises(EntropyForkError, match=rf"{actor}/huggingface has no tokenizer: {WAY_OUT}"):
        evaluation.evaluate(settings(model=actor), QUIET)
    shutil.rmtree(actor / "huggingface")
    with pytest.raises(EntropyForkError, match=rf"no tokenizer: no folder {actor}/huggingface"):
        evaluation.evaluate(settings(model=actor), QUIET)


def test_a_tokenizer_from_another_folder_gives_the_same_answers(
    bare: Path, apart: Path, settings: Settings, data: Path, tmp_path: Path
) -> None:
    evaluation.evaluate(settings(output=tmp_path / "own"), QUIET)
    arguments = ["evaluate", str(bare), "--data", str(data), "--output", str(tmp_path / "other"), "--answers", "4"]
    arguments += ["--max-tokens", "12", "--engine", "transformers", "--batch-size", "4", "--tokenizer", str(apart)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert lines(tmp_path / "other") == lines(tmp_path / "own")

    identity = json.loads((tmp_path / "other" / "manifest.json").read_text())["identity"]
    assert len(identity["tokenizer"]) == 64
    template = (apart / "chat_template.jinja").read_text()
    (apart / "chat_template.jinja").write_text(template + " ")
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1, "another tokenizer in the same folder"
    assert "\n  tokenizer: " in again.stderr
    assert "tokenizer" not in json.loads((tmp_path / "own" / "manifest.json").read_text())["identity"]


def test_vllm_reads_the_tokenizer_from_that_folder(
    bare: Path, apart: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vllm that only remembers what it was made with."""
    made: list[dict[str, Any]] = []

    def llm(**arguments: Any) -> SimpleNamespace:
        made.append(arguments)
        return SimpleNamespace(llm_engine=SimpleNamespace(has_unfinished_requests=lambda: False))

    pretend = ModuleType("vllm")
    pretend.LLM, pretend.SamplingParams = llm, object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", pretend)
    chosen = settings(model=bare, tokenizer=apart, engine="vllm")
    questions = evaluation.read_questions(chosen.data)
    engine, jobs, _ = evaluation.open_engine(chosen, "vllm", bare, None, questions)
    assert isinstance(engine, VllmEngine)
    assert len(jobs[0].prompt_ids) == len("0+0=")
    assert [(one["model"], one["tokenizer"]) for one in made] == [(str(bare), str(apart))]


def test_without_a_folder_vllm_reads_the_models_own(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    pretend = ModuleType("vllm")
    pretend.LLM = lambda **arguments: made.append(arguments) or SimpleNamespace(llm_engine=None)  # type: ignore[attr-defined]
    pretend.SamplingParams = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", pretend)
    VllmEngine(model, SamplingSettings(max_tokens=4), "float32", [0], 16)
    assert "tokenizer" not in made[0]


def test_another_models_tokenizer_is_named(model: Path, settings: Settings, tmp_path: Path) -> None:
    """Its tokens have numbers that the model does not know."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    size = len(tokenizer)
    larger = json.loads((model / "tokenizer.json").read_text())
    larger["model"]["vocab"] = {word: number + 40 for word, number in larger["model"]["vocab"].items()}
    larger["added_tokens"] = []
    shutil.copytree(model, tmp_path / "larger", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (tmp_path / "larger" / "tokenizer.json").write_text(json.dumps(larger))
    with pytest.raises(EntropyForkError, match=rf"gives a prompt the token \d+, but the model has {size} tokens"):
        evaluation.evaluate(settings(tokenizer=tmp_path / "larger"), QUIET)
