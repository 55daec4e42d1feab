"""Which ground truths an evaluation takes, and that each of a list counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.evaluations import QUIET
from hypothesis import given
from hypothesis import strategies as st

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.evaluation import evaluate as evaluation
from entropy_fork.evaluation.engines import AnswerJob, Generated
from entropy_fork.evaluation.questions import checksum, read_questions
from entropy_fork.reward import compute_score


def write(file: Path, truths: Sequence[Any], kind: pa.DataType | None = None) -> Path:
    """Questions with these ground truths, which are of one type."""
    column = pa.array(truths, kind)
    prompt = [[{"role": "user", "content": f"question {number}"}] for number in range(len(truths))]
    rewards = pa.StructArray.from_arrays([column], ["ground_truth"])
    pq.write_table(pa.table({"data_source": ["own"] * len(truths), "prompt": prompt, "reward_model": rewards}), file)
    return file


@pytest.mark.parametrize(
    ("truths", "kind", "expected"),
    [
        ([4, -1], pa.int64(), ["4", "-1"]),
        ([4], pa.uint8(), ["4"]),
        ([0.5], pa.float32(), ["0.5"]),
        ([Decimal("1.50")], pa.decimal128(5, 2), ["1.50"]),
        ([["1", "2"], ["3"]], pa.list_(pa.string()), [["1", "2"], "3"]),
        ([["1", "2"]], pa.large_list(pa.large_string()), [["1", "2"]]),
        ([[1, 2]], pa.list_(pa.int32()), [["1", "2"]]),
        (["7"], pa.string(), ["7"]),
    ],
)
def test_numbers_and_lists_are_ground_truths(tmp_path: Path, truths: list[Any], kind: Any, expected: list[Any]) -> None:
    questions = read_questions([write(tmp_path / "own.parquet", truths, kind)])
    assert [question.ground_truth for question in questions] == expected
    for question in questions:
        compute_score("own", r"\boxed{1}", question.ground_truth)


@pytest.mark.parametrize(
    ("truth", "kind"),
    [
        (None, pa.string()), (" ", pa.string()), (float("nan"), pa.float64()), (float("inf"), pa.float64()),
        (True, pa.bool_()), ([], pa.list_(pa.string())), (["1", None], pa.list_(pa.string())),
        (["1", " "], pa.list_(pa.string())), ({"target": 1}, pa.struct([("target", pa.int64())])),
        ([1.0, float("nan")], pa.list_(pa.float64())),
    ],
)  # fmt: skip
def test_what_nothing_can_equal_is_refused(tmp_path: Path, truth: Any, kind: Any) -> None:
    message = r"row 0 of .*: reward_model.ground_truth must be a text, a number, or a list of these"
    with pytest.raises(EntropyForkError, match=message):
        read_questions([write(tmp_path / "own.parquet", [truth], kind)])


def test_a_number_and_its_text_are_the_same_question(tmp_path: Path) -> None:
    """So an evaluation goes on after a data set was written again with the other type."""
    sums = [
        checksum(read_questions([write(tmp_path / f"{place}.parquet", [truth], kind)]))
        for place, (truth, kind) in enumerate([("4", None), (4, None), (["4"], None), (["4", "5"], None), ("5", None)])
    ]
    assert len(set(sums[:3])) == 1
    assert len(set(sums)) == 3


@given(st.lists(st.integers(-99, 99), min_size=1, max_size=4), st.integers(-99, 99))
def test_any_of_a_list_is_right(tmp_path_factory: pytest.TempPathFactory, truths: list[int], answer: int) -> None:
    file = tmp_path_factory.getbasetemp() / "any.parquet"
    (question,) = read_questions([write(file, [truths], pa.list_(pa.int64()))])
    score = compute_score("own", rf"\boxed{{{answer}}}", question.ground_truth)["score"]
    assert score == float(answer in truths)
    assert question.truth_text == " or ".join(map(str, truths))


def test_a_list_counts_in_an_evaluation(
    settings: Callable[..., evaluation.EvaluationSettings], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    class Says:
        """Answers 2 to every question."""

        def answers(self, jobs: Sequence[AnswerJob], _: Callable[[AnswerJob], bool]) -> Iterator[list[Generated]]:
            ids = tokenizer(r"\boxed{2}", add_special_tokens=False)["input_ids"]
            yield [Generated(job, [*ids, 0], False) for job in jobs]

    monkeypatch.setattr(evaluation, "TransformersEngine", lambda *_: Says())
    template = "{{ messages[0].content[-1] }}"
    for name, truths, kind, right in (
        ("lists", [["1", "2"], ["3", "4"], ["2"]], None, 2 / 3),
        ("integers", [2, 3, 4, 2], pa.int64(), 1 / 2),
    ):
        data = write(tmp_path / f"{name}.parquet", truths, kind)
        asked = settings(data=[data], output=tmp_path / name, answers=1, chat_template=template)
        assert evaluation.evaluate(asked, QUIET).benchmarks["own"].accuracy == pytest.approx(right)
