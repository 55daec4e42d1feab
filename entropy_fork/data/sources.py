"""The data sets of the paper and of the authors' script: where they are, and which column holds what.

We had no access to the data sets when we wrote this. The columns are those that public code reads, and "not seen" marks
what no such code confirmed. Nothing is guessed: a file with other columns is refused with the names of its columns
(``read.py``), and a row with other contents is listed in ``rejected.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from entropy_fork.common.errors import EntropyForkError

TRAIN, TEST = "train", "test"


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
        prefix, suffix: the source's own instruction around a question, which is cut off.
        instructed: refuse a chat message without that instruction, because another instruction could contradict ours.
        only: column → the one value (in lower case) that can be used, and the reason that is given for leaving out rows
            with another value. A column that does not exist leaves out nothing.
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
        if name not in SOURCES and name != BENCHMARKS:
            raise EntropyForkError(f"there is no source {name!r}; write one of {', '.join(SOURCES)}, {BENCHMARKS}")
    expanded = [
        each
        for name in names
        for each in ([s.name for s in SOURCES.values() if s.use == TEST] if name == BENCHMARKS else [name])
    ]
    return [SOURCES[name] for name in dict.fromkeys(expanded)]
