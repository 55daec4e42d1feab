"""The data sets of the paper and of the authors' script: where they are, and which column holds what.

We had no access to the data sets when we wrote this. The columns are those that public code reads, and "not seen" marks
what no such code confirmed. Nothing is guessed: a file with other columns is refused with the names of its columns
(``read.py``), and a row with other contents is listed in ``rejected.jsonl``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from entropy_fork.common.errors import EntropyForkError

TRAIN, TEST = "train", "test"

#: where the answer stands in a solution
HASHES, BOX = "hashes", "box"


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        name: the name of the output folder, and the rows' ``data_source``, for which verl logs validation metrics.
        title: its name for people.
        hub, config, split, file: where it is on the hub; ``file`` if a repository has several data sets.
        use: ``train`` or ``test``.
        rows: how many rows it has on the hub and, without duplicates, how many are expected; for people.
        license: the license that the data set's card states, if we know it.
        question, answer, identifier: names of columns, dotted for a field of a struct; the first that exists is taken.
        context: a column whose text is put before the question, if it has any.
        test_split: the name of its other split on the hub, for evaluation; None if it has only one.
        prefix, suffix: the source's own instruction around a question, which is cut off.
        instructed: refuse a chat message without that instruction, because another instruction could contradict ours.
        only: column → the one value (in lower case) that can be used, and the reason that is given for leaving out rows
            with another value. A column that does not exist leaves out nothing.
        solution: the column ``answer`` holds a whole solution. ``hashes``: the answer stands behind its last ``####``;
            ``box``: in its last ``\\boxed{}``. None: the column holds the answer itself.
        list_is_a_set: a list of answers means all of them, in any order. Else any of them is right.
        own: the user named the columns on the command line.
    """

    name: str
    title: str
    hub: str
    split: str
    use: str
    rows: str
    license: str
    question: tuple[str, ...]
    answer: tuple[str, ...]
    identifier: tuple[str, ...] = ("id",)
    config: str | None = None
    file: str | None = None
    context: str | None = None
    prefix: str = ""
    suffix: str = ""
    instructed: bool = False
    only: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    test_split: str | None = None
    solution: str | None = None
    list_is_a_set: bool = False
    own: bool = False


SOURCES = {
    source.name: source
    for source in (
        # Seen in code: the path; prompt (one user message), reward_model.ground_truth (integers as text),
        # extra_info.index (a uuid), ability, data_source; the instruction, to the letter; that 1.79M rows hold about
        # 17,400 questions. A copy with a bare question as text in the column prompt is read as well.
        Source(
            name="dapo_math_17k",
            title="DAPO-Math-17K",
            hub="BytedTsinghua-SIA/DAPO-Math-17k",
            split="train",
            file="data/dapo-math-17k.parquet",
            use=TRAIN,
            rows="1.79M, about 17.4k questions",
            license="Apache-2.0",
            question=("prompt",),
            answer=("reward_model.ground_truth",),
            identifier=("extra_info.index",),
            prefix=(
                "Solve the following math problem step by step. The last line of your response should be of the form "
                "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
            ),
            suffix='\n\nRemember to put your answer on its own line after "Answer:".',
            instructed=True,
        ),
        # Seen in code: the path; the columns prompt (one user message), reward_model.ground_truth, extra_info.index;
        # the instruction, in the authors' preprocessing. Not seen: whether every row carries it, hence not instructed
        # (it says the same as ours).
        Source(
            name="guru_math_54k",
            title="guru-RL-92k, math__combined_54.4k",
            hub="LLM360/guru-RL-92k",
            split="train",
            file="train/math__combined_54.4k.parquet",
            use=TRAIN,
            rows="54.4k",
            license="MIT",
            question=("prompt",),
            answer=("reward_model.ground_truth",),
            identifier=("extra_info.index",),
            suffix=" Please output the final answer within \\boxed{}.",
        ),
        # Seen in code: question; answer, a solution whose last line is "#### 72" (thousands with a comma); the config
        # main; splits train and test.
        Source(
            name="gsm8k",
            title="GSM8K",
            hub="openai/gsm8k",
            config="main",
            split="train",
            test_split="test",
            use=TRAIN,
            rows="7,473; test 1,319",
            license="MIT",
            question=("question",),
            answer=("answer",),
            solution=HASHES,
        ),
        # Seen in code: problem, level, solution (its last box is the answer), type; splits train and test.
        Source(
            name="math",
            title="MATH",
            hub="DigitalLearningGmbH/MATH-lighteval",
            split="train",
            test_split="test",
            use=TRAIN,
            rows="7,500; test 5,000",
            license="MIT",
            question=("problem",),
            answer=("solution",),
            solution=BOX,
        ),
        # Seen in code: problem, answer, solution, id; a parquet file below data/.
        Source(
            name="aime24",
            title="AIME 2024",
            hub="HuggingFaceH4/aime_2024",
            split="train",
            use=TEST,
            rows="30",
            license="see its card",
            question=("problem", "question"),
            answer=("answer",),
        ),
        # Seen in code: test.jsonl with problem, answer, id. yentinglin/aime_2025 has the same two columns.
        Source(
            name="aime25",
            title="AIME 2025",
            hub="math-ai/aime25",
            split="test",
            use=TEST,
            rows="30",
            license="see its card",
            question=("problem", "question"),
            answer=("answer",),
        ),
        # Seen in code: question, answer, in a split called test. Not seen: whether the answers are text or numbers.
        Source(
            name="amc23",
            title="AMC 2023",
            hub="math-ai/amc23",
            split="test",
            use=TEST,
            rows="40",
            license="see its card",
            question=("question", "problem"),
            answer=("answer",),
        ),
        # Seen in code: test.jsonl with problem, solution, answer, subject, level, unique_id.
        Source(
            name="math500",
            title="MATH-500",
            hub="HuggingFaceH4/MATH-500",
            split="test",
            use=TEST,
            rows="500",
            license="see its card",
            question=("problem",),
            answer=("answer",),
            identifier=("unique_id",),
        ),
        # Seen in code: question, answer, in a split called test. Not seen: a column with an id.
        Source(
            name="minerva",
            title="Minerva (OCWCourses)",
            hub="math-ai/minervamath",
            split="test",
            use=TEST,
            rows="272",
            license="see its card",
            question=("question", "problem"),
            answer=("answer",),
        ),
        # Seen in code: question, final_answer (a list of texts), context, modality, question_type, id; the config of
        # open-ended, text-only competition problems in English. math-ai/olympiadbench has the same columns. About 14%
        # of the questions have several answers: math-verify compares them as a set, so they can be used.
        Source(
            name="olympiadbench",
            title="OlympiadBench, OE_TO_maths_en_COMP",
            hub="Hothan/OlympiadBench",
            config="OE_TO_maths_en_COMP",
            split="train",
            use=TEST,
            rows="674",
            license="Apache-2.0",
            question=("question",),
            answer=("final_answer",),
            context="context",
            list_is_a_set=True,
            only={
                "question_type": ("open-ended", "theorem_proof"),
                "modality": ("text-only", "needs_an_image"),
            },
        ),
    )
}

BENCHMARKS = "benchmarks"
"""On the command line: all sources for evaluation."""


def named(names: list[str]) -> list[Source]:
    """The sources with these names; ``benchmarks`` stands for all sources for evaluation.

    Raises:
        EntropyForkError: a name is unknown.
    """
    for name in names:
        if name in SOURCES or name == BENCHMARKS:
            continue
        if Path(name).exists():
            raise EntropyForkError(
                f"{name} is a file or folder of your own: say which columns hold what, with --question COLUMN --answer "
                f"COLUMN --name NAME (or write SOURCE --from {name} if it is a copy of a known data set)"
            )
        close = difflib.get_close_matches(name, [*SOURCES, BENCHMARKS], 1)
        raise EntropyForkError(
            f"there is no source {name!r}{f'; did you mean {close[0]}?' if close else ''}; write one of "
            f"{', '.join(SOURCES)}, {BENCHMARKS}"
        )
    expanded = [
        each
        for name in names
        for each in ([s.name for s in SOURCES.values() if s.use == TEST] if name == BENCHMARKS else [name])
    ]
    return [SOURCES[name] for name in dict.fromkeys(expanded)]


def own_source(name: str, question: str, answer: str, use: str = TRAIN) -> Source:
    """A source of the user's own: any files that have these two columns.

    Args:
        name: of the output folder, and the rows' ``data_source``.
        question: the column with the question, dotted for a field of a mapping.
        answer: the column with the right answer, likewise.
        use: ``train`` or ``test``.

    Raises:
        EntropyForkError: the name is no name of a folder.
    """
    return Source(
        name=folder_name(name),
        title="your own",
        hub="",
        split="",
        use=use,
        rows="",
        license="",
        question=(question,),
        answer=(answer,),
        own=True,
    )


def folder_name(name: str) -> str:
    """The name itself, if it can name a folder.

    Raises:
        EntropyForkError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise EntropyForkError(
            f"--name {name!r} must begin with a letter or a digit, and have letters, digits, _, - and . only: it "
            f"names a folder, and the metrics of validation"
        )
    return name


def for_evaluation(source: Source) -> Source:
    """The test split of a source, which becomes ``test.parquet``.

    Raises:
        EntropyForkError: it has none.
    """
    if source.use == TEST:
        return source
    if source.test_split is None and not source.own:
        with_test = [each.name for each in SOURCES.values() if each.test_split]
        raise EntropyForkError(
            f"{source.name} has no test split; --split test is for {', '.join(with_test)}, and files of your own. "
            f"--holdout N holds out rows of the training data."
        )
    return replace(source, use=TEST, split=source.test_split or "")
