"""The CPU demo's world: the task, the build, and the positions of the choices."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import islice, permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("math_verify")
pytest.importorskip("typer")

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from entropy_fork.tokens.store import AnswerTokens, write_manifest, write_part
from examples import tiny_forks, tiny_world
from examples.cpu_demo import build, picture, world

QUIET = Console(quiet=True)
SHORT = build.Settings(
    steps=2, batch_size=4, train_problems=12, test_problems=6, warmup_problems=200, hidden_size=64, layers=1
)
#: what the short build holds besides the weights, which may differ by processor
MEASURED = {"train": "4710743ce4ab1107", "test": "8c3e60be863cc580", "vocabulary": "9ba418e00eb1af51"}
POOL = list(islice(world.draw_problems(random.Random(7), (3, 4)), 300))

problems = st.sampled_from(POOL)
seeds = st.integers(0, 2**32)


def evaluate(expression: str) -> int:
    """The value of `value operation` by Python, independent of the code under test."""
    value, symbol, amount = re.fullmatch(r"(\d+)([+*-])(\d)", expression).groups()
    return {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[symbol](int(value), int(amount))


@given(problems)
def test_answer_is_the_optimum_over_all_orders(problem):
    start, operations, goal = re.fullmatch(
        r"From (\d+) with (.+) once each make the (\w+) \\boxed\{\}\.", problem.prompt
    ).groups()
    results = []
    for order in permutations(operations.split()):
        value = int(start)
        for operation in order:
            value = evaluate(f"{value}{operation}")
        results.append(value)
    assert problem.answer == {"largest": max, "smallest": min}[goal](results)
    assert min(results) < max(results)


@given(problems)
def test_prompt_does_not_state_the_answer(problem):
    assert str(problem.answer) not in re.findall(r"\d+", problem.prompt)


def test_problems_are_distinct_and_repeat_with_the_seed():
    assert len({problem.key for problem in POOL}) == len(POOL)
    assert list(islice(world.draw_problems(random.Random(7), (3, 4)), 300)) == POOL


def test_an_exhausted_world_says_so(monkeypatch):
    monkeypatch.setattr(world, "START_RANGE", range(2, 3))
    monkeypatch.setattr(world, "AMOUNTS", {"+": range(1, 2), "-": range(1, 2), "*": range(2, 3)})
    monkeypatch.setattr(world, "MAX_MISSES", 100)
    with pytest.raises(RuntimeError, match="no new problem"):
        list(world.draw_problems(random.Random(0), (2,)))


@given(problems, seeds, st.sampled_from([0.0, 0.5, 1.0]))
def test_demonstrations_compute_right_and_use_each_operation_once(problem, seed, hint_rate):
    response = world.demonstrate(problem, random.Random(seed), hint_rate)
    steps = re.findall(r"([+*-]\d)=(\d+)\.", response)
    assert sorted(operation for operation, _ in steps) == sorted(map(str, problem.operations))
    befores = [str(problem.start), *(after for _, after in steps)]
    assert all(
        evaluate(before + operation) == int(after) for before, (operation, after) in zip(befores, steps, strict=False)
    )
    assert response.endswith(rf" \boxed{{{befores[-1]}}}")
    assert world.check_chain(problem, response) == (True, True)
    if hint_rate == 1.0:
        assert tiny_world.is_correct(build.WORLD.data_source, response, str(problem.answer))


def test_unhinted_demonstrations_choose_every_order():
    problem = next(problem for problem in POOL if len(problem.operations) == 3)
    rng = random.Random(0)
    orders = {tuple(re.findall(r"[+*-]\d(?==)", world.demonstrate(problem, rng, 0.0))) for _ in range(200)}
    assert len(orders) == 6


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"First +5=12. Then *3=36. Last -4=32. \boxed{32}", (True, True)),
        (r"First +5=13. Then *3=39. Last -4=35. \boxed{35}", (False, True)),
        (r"First +5=12. Then *3=36. Last -4=32. \boxed{33}", (False, True)),
        (r"First +5=12. Then *3=36. Last *3=108. \boxed{108}", (True, False)),
        (r"First +5=12. Last *3=36. \boxed{36}", (True, False)),
        (r"Well, First +5=12. Then *3=36. Last -4=32. \boxed{32}", (True, False)),
        (r"First +5=12. Then *3=36. Last -4=32.", (False, False)),
        ("", (False, False)),
    ],
)
def test_check_chain(response, expected):
    operations = (world.Operation("+", 5), world.Operation("*", 3), world.Operation("-", 4))
    assert world.check_chain(world.Problem(7, operations, world.Goal.LARGEST), response) == expected


def test_find_choices_leaves_out_what_is_forced():
    response = r"First +5=12. Then *3=36. Last -4=32. \boxed{32}"
    found = [(response[choice.start : choice.end], choice.kind.value) for choice in world.find_choices(response)]
    assert found == [
        ("First", "connective"),
        ("+5", "operation"),
        ("Then", "connective"),
        ("*3", "operation"),
        ("Last", "connective"),
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("demo") / "world"
    assert tiny_world.build(build.WORLD, output, SHORT, QUIET) is not None
    return output


def rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def test_parquet_follows_the_schema_and_the_splits_are_disjoint(built):
    train, test = rows(built / "train.parquet"), rows(built / "test.parquet")
    assert (len(train), len(test)) == (SHORT.train_problems, SHORT.test_problems)
    for split, part in (("train", train), ("test", test)):
        assert [row["extra_info"]["index"] for row in part] == list(range(len(part)))
        for row in part:
            assert row["data_source"] == "cpu_demo"
            assert row["ability"] == "math"
            assert [message["role"] for message in row["prompt"]] == ["user"]
            assert row["reward_model"]["style"] == "rule"
            assert row["reward_model"]["ground_truth"].isdecimal()
            assert row["extra_info"]["split"] == split
    parts = build.split_problems(SHORT)
    keys = [problem.key for part in (parts.warmup, parts.train, parts.test) for problem in part]
    assert len(set(keys)) == len(keys)
    assert [row["prompt"][0]["content"] for row in train] == [problem.prompt for problem in parts.train]


def test_the_world_is_the_one_of_the_results_in_the_docs(built):
    assert build.Settings().checksum == "93473392c53341e01e903f6b1957775a210073f92e3001d7f1dcb48efff84809"
    held = {name: rows(built / f"{name}.parquet") for name in ("train", "test")}
    held["vocabulary"] = sorted(load_tokenizer(built).get_vocab().items())
    found = {name: hashlib.sha256(json.dumps(each).encode()).hexdigest()[:16] for name, each in held.items()}
    assert found == MEASURED


@given(text=st.text())
def test_tokenizer_spells_any_text(built, text):
    tokenizer = load_tokenizer(built)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


_tokenizers: dict[Path, object] = {}


def load_tokenizer(output: Path):
    return _tokenizers.setdefault(output, AutoTokenizer.from_pretrained(output / "model"))


def test_vocabulary_fits_and_a_choice_is_one_token(built):
    tokenizer = load_tokenizer(built)
    model = AutoModelForCausalLM.from_pretrained(built / "model")
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode(r"First +5=12. Last *3=36. \boxed{36}")]
    assert tokens == ["First", " +5", *"=12.", " Last", " *3", *"=36.", r" \boxed{", *"36}"]


def test_chat_template_splits_where_the_response_begins(built):
    tokenizer = load_tokenizer(built)
    user = [{"role": "user", "content": "Q?"}]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": "First"}], tokenize=False)
    assert prompt == "User:\nQ?\nAssistant:\n"
    assert whole == "User:\nQ?\nAssistant:\nFirst<|endoftext|>"
    assert tokenizer.apply_chat_template([{}], tokenize=False) == ""
    assert tokenizer.encode(whole) == [*tokenizer.encode(prompt), *tokenizer.encode("First"), tokenizer.eos_token_id]


def test_labels_are_the_response_and_eos(built):
    tokenizer = load_tokenizer(built)
    batch = tiny_world.collate(build.WORLD, tokenizer, POOL[:8], random.Random(0), 0.0)
    for labels, problem in zip(batch["labels"], POOL, strict=False):
        text = tokenizer.decode(labels[labels != tiny_world.IGNORED_LABEL])
        assert text.endswith("}<|endoftext|>")
        assert world.check_chain(problem, text.removesuffix("<|endoftext|>")) == (True, True)


def test_a_second_build_does_nothing_and_other_settings_are_refused(built, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    monkeypatch.setattr(tiny_world, "build_into", lambda *_: pytest.fail("built again"))
    assert tiny_world.build(build.WORLD, built, SHORT, QUIET) is None
    with pytest.raises(tiny_world.BuildMismatchError, match="other settings"):
        tiny_world.build(build.WORLD, built, build.Settings(seed=1), QUIET)
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before
    assert json.loads((built / "manifest.json").read_text())["checksum"] == SHORT.checksum


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_killed_build_leaves_nothing(tmp_path, monkeypatch, error):
    def die(*_args):
        raise error

    monkeypatch.setattr(tiny_world, "warm_up", die)
    with pytest.raises(error):
        tiny_world.build(build.WORLD, tmp_path / "world", SHORT, QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_directory_is_refused_and_overwriting_replaces_it(tmp_path, monkeypatch):
    output = tmp_path / "world"
    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(tiny_world.BuildMismatchError, match="no finished build"):
        tiny_world.build(build.WORLD, output, SHORT, QUIET)
    assert (output / "precious").exists()

    monkeypatch.setattr(
        tiny_world, "build_into", lambda _, folder, *__: (folder / tiny_world.MANIFEST).write_text("{}")
    )
    tiny_world.build(build.WORLD, output, SHORT, QUIET, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert [path.name for path in output.iterdir()] == [tiny_world.MANIFEST]


def test_entropies_match_the_model_one_rollout_at_a_time(built):
    tokenizer = load_tokenizer(built)
    model = AutoModelForCausalLM.from_pretrained(built / "model").eval()
    texts = [r"First +5=12. Last *3=36. \boxed{36}", "Begin 3"]
    batch = [tiny_world.Rollout(tokenizer.encode("User:\n"), tokenizer.encode(text), text) for text in texts]
    together = tiny_forks.response_entropies(model, batch, tokenizer.pad_token_id)
    for rollout, entropies in zip(batch, together, strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        log_probs = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = -(log_probs.exp() * log_probs).sum(-1)
        assert entropies == pytest.approx(expected.tolist(), abs=1e-4)
        assert all(0 <= entropy <= math.log(len(tokenizer)) + 1e-4 for entropy in entropies)


def test_choices_land_on_the_tokens_that_make_them(built):
    tokenizer = load_tokenizer(built)
    text = r"First +5=12. Then *3=36. Last -4=32. \boxed{32}"
    rollout = tiny_world.Rollout([], tokenizer.encode(text), text)
    labelled = tiny_forks.label_tokens(tokenizer, world.find_choices, rollout, [0.0] * len(rollout.response_ids))
    assert [token.text for token in labelled if token.kind is not None] == ["First", " +5", " Then", " *3", " Last"]


def test_the_picture_shows_the_weights_that_training_would_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = ["First", " <b>", "<|endoftext|>"]
    entropies = [[0.1, 0.9, 0.0], [0.2, 0.8, 0.3]]  # the top third of six tokens: one of each answer
    answers = [
        AnswerTokens(
            prompt="User:\n1 < 2?\nAssistant:\n",
            text="First <b>",
            token_ids=np.array([1, 2, 3], dtype=np.int32),
            pieces=pieces,
            entropy=np.array(row, dtype=np.float32),
            log_prob=np.zeros(3, dtype=np.float32),
            selected=np.array([False, True, False]),
            answer=number,
            score=1.0 - number,
        )
        for number, row in enumerate(entropies)
    ]
    write_part(tmp_path / "tokens", 0, answers)
    write_manifest(tmp_path / "tokens", {"top_ratio": 1 / 3, "threshold": 0.8})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    command = typer.Typer()
    command.command()(picture.main)
    result = CliRunner().invoke(command, ["--tokens", "tokens", "--answers", "0", "1"])
    assert result.output.startswith("written: forking_tokens.svg, with the answers 0 and 1")
    assert not list((tmp_path / "docs" / "pictures").iterdir()), "the README's own picture, unless it is named"
    picture.main(tmp_path / "tokens", (0, 1), tmp_path / "two.svg")
    assert (tmp_path / "two.svg").read_bytes() == (tmp_path / "forking_tokens.svg").read_bytes()
    svg = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in ElementTree.parse(tmp_path / "two.svg").iter(f"{svg}text")]
    assert texts[:2] == ["question", "1 < 2?"]
    for verdict in ("right, reward 1", "wrong, reward 0"):
        start = texts.index(verdict) + 2
        assert texts[start : start + 6] == ["First", "0", "<b>", "3", "end", "0"]
    assert "= 2, whose entropy is at least τ = 0.800." in str(texts[-1])
