"""``entropy-fork evaluate`` end to end on a tiny model, its memory between calls, and verl's sharded checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.evaluations import QUIET, TEMPLATE, lines, write_data
from helpers.processes import Processes
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from entropy_fork.cli import app
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.evaluation import engines
from entropy_fork.evaluation import evaluate as evaluation
from entropy_fork.evaluation.answer_store import AnswerStore, ScoredAnswer
from entropy_fork.evaluation.checkpoint import Checkpoint, fold_adapter
from entropy_fork.evaluation.engines import AnswerJob, Generated, SamplingSettings
from entropy_fork.evaluation.questions import read_questions


class Scripted:
    """An engine that answers what is written for (question, sample)."""

    def __init__(self, texts: dict[tuple[int, int], str], folder: Path):
        from transformers import AutoTokenizer

        self.tokenizer, self.texts = AutoTokenizer.from_pretrained(folder), texts

    def answers(self, jobs: Sequence[AnswerJob], is_wanted: Callable[[AnswerJob], bool]) -> Iterator[list[Generated]]:
        for job in filter(is_wanted, jobs):
            text = self.texts.get((job.question, job.sample), "no")
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            yield [Generated(job, [*ids, 0], truncated=text == "no")]


def test_numbers_and_tables_of_scripted_answers(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions 0…4 are aime24 (truth 2n), 5…8 are cpu; two answers each."""
    texts = {
        (0, 0): r"\boxed{0}",
        (0, 1): r"\boxed{0}",
        (1, 0): r"\boxed{2}",
        (2, 1): r"\boxed{7}",
        (5, 1): r"so \boxed{10}",
    }
    monkeypatch.setattr(evaluation, "TransformersEngine", lambda folder, *_: Scripted(texts, folder))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "50")  # without both, rich takes 80 columns where TERM is dumb
    arguments = ["evaluate", str(model), "--data", str(data), "--output", str(tmp_path / "out"), "--answers", "2"]
    arguments += ["--max-tokens", "20", "--engine", "transformers", "--compare", "32b"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    aime, cpu, mean = results["benchmarks"]["aime24"], results["benchmarks"]["cpu"], results["average"]
    assert (aime["questions"], aime["accuracy"]) == (5, pytest.approx(3 / 10))
    assert aime["pass_at"] == {"1": pytest.approx(3 / 10), "2": pytest.approx(2 / 5)}
    assert (aime["boxed"], aime["truncated"]) == (pytest.approx(4 / 10), pytest.approx(6 / 10))
    assert aime["mean_tokens"] == pytest.approx((4 * 10 + 6 * 3) / 10)  # a character and the end are a token each
    assert (cpu["accuracy"], cpu["pass_at"]["2"]) == (pytest.approx(1 / 8), pytest.approx(1 / 4))
    assert mean["accuracy"] == pytest.approx((3 / 10 + 1 / 8) / 2)
    assert results["paper"]["aime24"]["top20"] == {"accuracy": pytest.approx(0.6354), "mean_tokens": 12198}
    assert results["paper"]["cpu"] == results["paper"]["average"] == {"all": None, "top20": None}

    markdown = (tmp_path / "out" / "results.md").read_text()
    (row,) = [line for line in markdown.splitlines() if line.startswith("| aime24 | 5 |")]
    assert row.startswith("| aime24 | 5 | 30.00 |")
    assert row.endswith("| 6 | 60.0% | 40.0% | 55.83 / 9644 | 63.54 / 12198 |")
    assert "| aime24 | 30.00 | 40.00 |" in markdown
    assert "55.83 / 9644" in result.output


def test_an_interrupted_evaluation_gives_the_same_answers(
    settings: Callable[..., evaluation.EvaluationSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluation.evaluate(settings(output=tmp_path / "whole"), QUIET)
    assert len({json.loads(line)["text"] for line in lines(tmp_path / "whole")}) > 20, "the answers should differ"

    batches = []
    append = AnswerStore.append

    def dying_append(store: AnswerStore, records: Sequence[ScoredAnswer]) -> None:
        batches.append(len(records))
        if len(batches) == 3:
            append(store, records[:1])  # a kill in the middle of writing a batch …
            store._file.write(b'{"question": 3, "sam')  # … and of a line
            raise KeyboardInterrupt
        append(store, records)

    monkeypatch.setattr(AnswerStore, "append", dying_append)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(settings(output=tmp_path / "parts"), QUIET)
    monkeypatch.setattr(AnswerStore, "append", append)
    kept = (tmp_path / "parts" / "answers.jsonl").read_bytes().rpartition(b"\n")[0].decode().splitlines()
    assert 0 < len(kept) < 36
    parts = evaluation.evaluate(settings(output=tmp_path / "parts"), QUIET)

    assert parts == whole
    assert lines(tmp_path / "parts")[: len(kept)] == kept, "what was there is not drawn again"
    assert sorted(lines(tmp_path / "parts")) == sorted(lines(tmp_path / "whole"))


def test_a_finished_evaluation_loads_no_model_and_more_answers_keep_the_first(
    settings: Callable[..., evaluation.EvaluationSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluation.evaluate(settings(answers=2), QUIET)
    two = lines(tmp_path / "out")
    more = evaluation.evaluate(settings(answers=4), QUIET)
    assert lines(tmp_path / "out")[:18] == two
    assert len(lines(tmp_path / "out")) == 36
    assert more.benchmarks["cpu"].answers_per_question == 4
    monkeypatch.setattr(evaluation, "_answer", lambda *_: pytest.fail("answered again"))
    assert evaluation.evaluate(settings(answers=2), QUIET) == first
    assert evaluation.evaluate(settings(answers=4), QUIET) == more


def test_another_seed_draws_other_answers_and_greedy_is_the_models(
    settings: Callable[..., evaluation.EvaluationSettings], model: Path, tmp_path: Path
) -> None:
    evaluation.evaluate(settings(output=tmp_path / "0"), QUIET)
    evaluation.evaluate(settings(output=tmp_path / "1", sampling=SamplingSettings(max_tokens=12, seed=1)), QUIET)
    texts = [[json.loads(line)["text"] for line in lines(tmp_path / name)] for name in "01"]
    assert texts[0] != texts[1]

    greedy = SamplingSettings(temperature=0.0, max_tokens=12)
    evaluation.evaluate(settings(output=tmp_path / "greedy", answers=1, sampling=greedy, dtype="float32"), QUIET)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for number, line in enumerate(lines(tmp_path / "greedy")):
        ids = torch.tensor([tokenizer(f"{number}+{number}=", add_special_tokens=False)["input_ids"]])
        answer = reference.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert json.loads(line)["text"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert json.loads(line)["tokens"] == len(answer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": SamplingSettings(max_tokens=13)}, "sampling.max_tokens: 12 there, 13 now"),
        ({"sampling": SamplingSettings(max_tokens=12, seed=4)}, "sampling.seed: 0 there, 4 now"),
        ({"dtype": "float32"}, "engine.dtype: 'auto' there, 'float32' now"),
        ({"chat_template": TEMPLATE + " "}, "chat_template: "),
    ],
)
def test_other_settings_are_not_mixed_in(
    settings: Callable[..., evaluation.EvaluationSettings], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    evaluation.evaluate(settings(answers=1), QUIET)
    before = lines(tmp_path / "out")
    with pytest.raises(EntropyForkError, match="must not be mixed") as error:
        evaluation.evaluate(settings(**change), QUIET)
    assert message in str(error.value)
    assert str(error.value).count(" now\n") == 1, "only what differs is named"
    assert lines(tmp_path / "out") == before


def test_other_weights_and_other_questions_are_not_mixed_in(
    settings: Callable[..., evaluation.EvaluationSettings], model: Path, tmp_path: Path
) -> None:
    evaluation.evaluate(settings(answers=1), QUIET)
    trained = tmp_path / "trained"
    shutil.copytree(model, trained)
    network = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    network.model.norm.weight.data *= 1.01
    network.save_pretrained(trained)
    with pytest.raises(EntropyForkError, match=r"\n  model: '.*' there, '.*' now\nRepeat"):
        evaluation.evaluate(settings(answers=1, model=trained), QUIET)
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    evaluation.evaluate(settings(answers=1, model=moved), QUIET)  # the same model elsewhere
    other = write_data(tmp_path / "other.parquet", ["aime24"] * 6)
    with pytest.raises(EntropyForkError, match=r"\n  questions: '.*' there, '.*' now\nRepeat"):
        evaluation.evaluate(settings(answers=1, data=[other]), QUIET)


def test_a_mistake_before_the_first_answer_can_be_corrected(
    settings: Callable[..., evaluation.EvaluationSettings],
) -> None:
    with pytest.raises(EntropyForkError, match="64 positions: write --max-tokens 60 or less"):
        evaluation.evaluate(settings(sampling=SamplingSettings()), QUIET)
    evaluation.evaluate(settings(), QUIET)


def test_a_broken_line_and_a_second_process_are_named(tmp_path: Path) -> None:
    record = ScoredAnswer(0, 0, 1, "a", 3, False, 1.0, True, "text")
    with AnswerStore(tmp_path / "out", {"x": 1}) as store:
        store.append([record])
        with pytest.raises(EntropyForkError, match="another process is writing"):
            AnswerStore(tmp_path / "out", {"x": 1})
    with (tmp_path / "out" / "answers.jsonl").open("a") as file:
        file.write("garbage\n")
    with pytest.raises(EntropyForkError, match=r"line 2 of .*answers.jsonl is not an answer"):
        AnswerStore(tmp_path / "out", {"x": 1})
    with pytest.raises(EntropyForkError, match="files of something else"):
        AnswerStore(tmp_path, {"x": 1})


def test_bad_data_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EntropyForkError, match=r"no file .*none\.parquet"):
        read_questions([tmp_path / "none.parquet"])
    text = tmp_path / "text.parquet"
    text.write_text("{}")
    with pytest.raises(EntropyForkError, match="cannot be read as parquet"):
        read_questions([text])
    good = {"data_source": "a", "prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": "1"}}
    for change, message in (
        ({"prompt": "?"}, "row 1 of .*: prompt must be a list of messages"),
        ({"reward_model": {"ground_truth": " "}}, "row 1 of .*: reward_model.ground_truth must be a text"),
    ):
        file = tmp_path / "rows.parquet"
        rows = [{**good, **change}] * 2 if "prompt" in change else [good, {**good, **change}]
        pq.write_table(pa.Table.from_pylist(rows), file)
        with pytest.raises(EntropyForkError, match=message if "prompt" not in change else message.replace("1", "0")):
            read_questions([file])
    pq.write_table(pa.table({"data_source": ["a"]}), file)
    with pytest.raises(EntropyForkError, match="no column prompt, reward_model"):
        read_questions([file])


def test_bad_settings_are_one_clear_error(
    settings: Callable[..., evaluation.EvaluationSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong, message in (
        ({"answers": 0}, "answers is 0, and must be at least 1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"answers": 2, "sampling": SamplingSettings(temperature=0)}, "write --answers 1"),
    ):
        with pytest.raises(EntropyForkError, match=message):
            settings(**wrong)
    for values, message in (({"top_p": 0.0}, "top_p"), ({"top_k": 0}, "top_k"), ({"max_tokens": 0}, "max_tokens")):
        with pytest.raises(EntropyForkError, match=message):
            SamplingSettings(**values)
    with pytest.raises(
        EntropyForkError, match=r"neither a name \(chat, paper, worked\) nor a file nor a Jinja template"
    ):
        evaluation.evaluate(settings(chat_template="missing.jinja"), QUIET)
    assert engines.parse_arguments(["a=1", "b.c=[x, 2]"]) == {"a": 1, "b": {"c": ["x", 2]}}
    with pytest.raises(EntropyForkError, match="KEY=VALUE"):
        engines.parse_arguments(["max_num_seqs"])
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: None)
    assert engines.choose_engine("auto") == "transformers"
    with pytest.raises(EntropyForkError, match="vLLM is not installed"):
        engines.choose_engine("vllm")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(EntropyForkError, match="does not use this machine's accelerator"):
        engines.choose_engine("auto")


def test_the_chat_template_of_a_file_is_what_the_model_reads(
    settings: Callable[..., evaluation.EvaluationSettings], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[AnswerJob]] = []

    class Spy(Scripted):
        def answers(
            self, jobs: Sequence[AnswerJob], is_wanted: Callable[[AnswerJob], bool]
        ) -> Iterator[list[Generated]]:
            seen.append(list(jobs))
            return super().answers(jobs, is_wanted)

    monkeypatch.setattr(evaluation, "TransformersEngine", lambda folder, *_: Spy({}, folder))
    file = tmp_path / "template.jinja"
    file.write_text("ask {{ messages[0].content }}")
    spy = settings(answers=1, chat_template=str(file), output=tmp_path / "custom")
    evaluation.evaluate(spy, QUIET)
    evaluation.evaluate(settings(answers=1), QUIET)
    tokenizer = Scripted({}, model).tokenizer
    assert [tokenizer.decode(jobs[3].prompt_ids) for jobs in seen] == ["ask 3+3", "3+3="]

    assert evaluation.read_template("chat") is None, "the tokenizer's own"
    tokenizer.chat_template = evaluation.read_template("paper")
    message = [{"role": "user", "content": "3+3"}]
    assert (
        tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        == "User:\n3+3\n\nAssistant:\n"
    )

    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(EntropyForkError, match="has no chat template"):
        evaluation.evaluate(settings(model=bare, output=tmp_path / "bare-out"), QUIET)


# ---- verl's sharded checkpoints, written by verl's own checkpoint manager on real ranks


def save_sharded(state: dict[str, Any], source: str, target: str, with_adapter: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoTokenizer
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    network = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if with_adapter:
        torch.manual_seed(1)
        network = get_peft_model(
            network, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("fsdp",))
    fully_shard(network, mesh=mesh)
    manager = FSDPCheckpointManager(
        network,
        processing_class=AutoTokenizer.from_pretrained(source),
        checkpoint_config={"save_contents": ["model"], "load_contents": ["model"]},
    )
    manager.save_checkpoint(target, global_step=3)


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> Iterator[Processes]:
    processes = Processes(request.param)
    yield processes
    processes.close()


def test_a_sharded_checkpoint_evaluates_as_its_hugging_face_twin(
    ranks: Processes, settings: Callable[..., evaluation.EvaluationSettings], model: Path, tmp_path: Path
) -> None:
    """The twin's weights are bfloat16 already, so verl's rounding changes nothing and every answer is the same."""
    actor = tmp_path / "run" / "global_step_3" / "actor"
    ranks(save_sharded, [(str(model), str(actor), False)] * ranks.size)
    twin = evaluation.evaluate(settings(output=tmp_path / "twin", dtype="float32"), QUIET)
    merged = tmp_path / "merged" if ranks.size == 1 else None
    sharded = settings(model=actor.parent, output=tmp_path / "sharded", dtype="float32", merged=merged)
    assert evaluation.evaluate(sharded, QUIET).benchmarks == twin.benchmarks
    assert lines(tmp_path / "sharded") == lines(tmp_path / "twin")
    assert not (tmp_path / "sharded" / "merged").exists(), "a folder that was made for the evaluation alone is removed"

    shard = actor / f"model_world_size_{ranks.size}_rank_{ranks.size - 1}.pt"
    content = shard.read_bytes()
    if merged is not None:
        stamp = (merged / "model.safetensors").stat().st_mtime_ns
        evaluation.evaluate(replace(sharded, answers=5), QUIET)
        assert (merged / "model.safetensors").stat().st_mtime_ns == stamp, "merged once"
        shard.write_bytes(content[:-100] + bytes(100))
        with pytest.raises(EntropyForkError, match="was not merged from"):
            Checkpoint.find(actor).merge(merged)
    else:
        shard.write_bytes(content[:-100] + bytes(100))
        with pytest.raises(EntropyForkError, match="verl's merger could not read"):
            Checkpoint.find(actor).merge(tmp_path / "broken")
        assert not list(tmp_path.glob("*broken*")), "nothing half-written"
    assert Checkpoint.find(tmp_path / "run").path == actor
    shard.unlink()
    with pytest.raises(EntropyForkError, match=f"lacks the shards of ranks {ranks.size - 1} of {ranks.size}"):
        Checkpoint.find(actor)


@pytest.mark.parametrize("ranks", [1], indirect=True)  # shards are merged in the same way, adapter or not
def test_a_lora_adapter_is_part_of_the_model(ranks: Processes, model: Path, tmp_path: Path) -> None:
    actor = tmp_path / "actor"
    ranks(save_sharded, [(str(model), str(actor), True)])
    state = torch.load(actor / "model_world_size_1_rank_0.pt", weights_only=False)
    whole = {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in state.items()}
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    down = whole[f"{prefix}.lora_B.default.weight"] @ whole[f"{prefix}.lora_A.default.weight"]
    expected = whole[f"{prefix}.base_layer.weight"] + 8 / 4 * down

    folder = Checkpoint.find(actor).merge(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = merged.model.layers[1].mlp.down_proj.weight
    assert (expected - whole[f"{prefix}.base_layer.weight"]).abs().max() > 0.1, "the adapter should do something"
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert not (folder / "lora_adapter").exists()

    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter" / "adapter_config.json").write_text('{"lora_alpha": 0}')
    with pytest.raises(EntropyForkError, match=r"no lora_train_meta\.json"):
        fold_adapter(folder)


def test_a_foreign_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(EntropyForkError, match="neither a Hugging Face folder"):
        Checkpoint.find(tmp_path)
    with pytest.raises(EntropyForkError, match="no folder"):
        Checkpoint.find(tmp_path / "nowhere")
