"""Draw a model's own answers, as ``entropy-fork evaluate`` does, and keep their token ids until they are measured.

vLLM takes most of a GPU's memory, and gives it back only when its process ends. So it answers in a process of its own.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from entropy_fork.analysis.measure import TokenIds
from entropy_fork.analysis.texts import Text
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.progress import paused, task
from entropy_fork.evaluation import evaluate as evaluation
from entropy_fork.evaluation.answer_store import AnswerStore
from entropy_fork.evaluation.checkpoint import Checkpoint
from entropy_fork.evaluation.engines import choose_engine
from entropy_fork.evaluation.questions import read_questions
from entropy_fork.reward import compute_score
from entropy_fork.tokens.store import token_pieces

#: exit status of the child process when it has an error of ours to hand over, and the mark before its message
REFUSED, MARK = 3, "entropy-fork: "


@dataclass(frozen=True)
class DrawnAnswer:
    """An answer that has not been measured: question, number of the answer to it, token ids of prompt and answer."""

    question: int
    sample: int
    prompt_ids: list[int]
    token_ids: list[int]
    truncated: bool

    @property
    def key(self) -> tuple[int, int]:
        """Question and number of the answer, by which an :class:`AnswerStore` finds it."""
        return self.question, self.sample

    def without_content(self) -> DrawnAnswer:
        """The same without its token ids, as an :class:`AnswerStore` keeps it in memory."""
        return replace(self, prompt_ids=[], token_ids=[])


class Prompts:
    """The texts are answers to the prompts of parquet files.

    Args:
        settings: the settings of an evaluation; ``data`` are the prompts, and ``output`` is where answers are kept.
        checkpoint: the model that answers.
        limit: at most this many questions, the first ones; None for all.

    Raises:
        EntropyForkError: a file or a setting cannot be used; raised before anything is drawn.
    """

    kind = "model"

    def __init__(self, settings: evaluation.EvaluationSettings, checkpoint: Checkpoint, limit: int | None = None):
        self.settings, self.checkpoint = settings, checkpoint
        self.questions = read_questions(settings.data)[:limit]
        self.engine = choose_engine(settings.engine)
        self.template = evaluation.read_template(settings.chat_template)

    def identity(self) -> dict[str, Any]:
        """Everything that must be the same to continue a folder."""
        drawn = evaluation.identity_of(self.settings, self.checkpoint, self.engine, self.questions, self.template)
        return drawn | {"answers": self.settings.answers}

    def __len__(self) -> int:
        return len(self.questions) * self.settings.answers

    def draw(self, folder: Path, console: Console) -> None:
        """Answer what has not been answered; ``folder`` is the Hugging Face folder of the model."""
        with self._store() as store:
            if len(store.records) == len(self):
                return
        if self.engine == "vllm":
            _draw_elsewhere(self, folder, console.quiet)
        else:
            _draw(self, folder, console.quiet)

    def texts(self, tokenizer: Any, start: int) -> Iterator[Text]:
        """The answers from number ``start`` on: the first answers to all questions, then the second ones, …"""
        with self._store() as store:
            for number in range(start, len(self)):
                sample, question = divmod(number, len(self.questions))
                drawn, asked = store.whole((question, sample)), self.questions[question]
                text = tokenizer.decode(drawn.token_ids, skip_special_tokens=True)
                yield Text(
                    answer=number,
                    ids=TokenIds(np.array(drawn.prompt_ids, np.int32), np.array(drawn.token_ids, np.int32)),
                    prompt=tokenizer.decode(drawn.prompt_ids),
                    text=text,
                    pieces=token_pieces(tokenizer, drawn.token_ids),
                    data_source=asked.data_source,
                    ground_truth=asked.truth_text,
                    score=compute_score(asked.data_source, text, asked.ground_truth)["score"],
                    truncated=drawn.truncated,
                )

    def _store(self) -> AnswerStore[DrawnAnswer]:
        return AnswerStore(self.settings.output, self.identity(), kind=DrawnAnswer)


def _draw_elsewhere(prompts: Prompts, folder: Path, quiet: bool) -> None:
    """Draw in a new interpreter, not in a worker of multiprocessing.

    Such a worker ends without the exit handlers that stop vLLM's own processes, and would wait for them for ever.
    """
    with paused():  # the child shows its own progress
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=pickle.dumps((prompts, folder, quiet)), stdout=subprocess.PIPE
        )
    if done.returncode == REFUSED:
        raise EntropyForkError(done.stdout.decode(errors="replace").strip().rsplit(MARK, 1)[-1])
    if done.returncode:
        raise EntropyForkError(
            f"vLLM's process ended with exit status {done.returncode}. Its output is above, and its answers are kept"
        )


def _main() -> None:
    try:
        # By the module's own name, since the pickled classes are not those of __main__.
        from entropy_fork.analysis.draw_answers import _draw

        _draw(*pickle.load(sys.stdin.buffer))
    except EntropyForkError as error:
        print(MARK, error, sep="")
        sys.exit(REFUSED)


def _draw(prompts: Prompts, folder: Path, quiet: bool) -> None:
    """Draw the answers. Runs in this process or in a child."""
    settings, console = prompts.settings, Console(emoji=False, stderr=True, quiet=quiet)
    with prompts._store() as store:
        with task(f"loading {folder} into {prompts.engine}", console=console):
            engine, jobs, _ = evaluation.open_engine(
                settings, prompts.engine, folder, prompts.template, prompts.questions
            )
        began, tokens = time.monotonic(), 0
        with task("answers drawn", len(jobs), completed=len(store.records), console=console) as shown:
            wanted = {(job.question, job.sample) for job in jobs} - store.records.keys()
            for batch in engine.answers(jobs, lambda job: (job.question, job.sample) in wanted):
                drawn = [
                    DrawnAnswer(
                        one.job.question, one.job.sample, list(one.job.prompt_ids), one.token_ids, one.truncated
                    )
                    for one in batch
                ]
                store.append(drawn)
                tokens += sum(len(one.token_ids) for one in drawn)
                speed = tokens / (time.monotonic() - began)
                shown.advance(len(drawn), f"{speed:,.0f} tokens/s")


if __name__ == "__main__":
    _main()
