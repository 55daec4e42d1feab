"""What ``entropy-fork analyze`` does: measure the tokens of texts with a model, and write them to a folder.

First answers are drawn, if the texts are the model's own answers. Then each text goes through the model once, part by
part. Then the top ρ of all tokens is marked. After a stop the same command continues behind the last whole part, and
gives the same files as if it had never been stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from entropy_fork.analysis.draw_answers import Prompts
from entropy_fork.analysis.mark_top import select_top
from entropy_fork.analysis.measure import Measurer
from entropy_fork.analysis.texts import Like, Rollouts, Text, TextSource
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.foreign_text import visible
from entropy_fork.common.output_folder import lock, refuse_other
from entropy_fork.common.progress import task
from entropy_fork.core.selection import kept_count
from entropy_fork.evaluation import evaluate as evaluation
from entropy_fork.evaluation.answer_store import ANSWERS
from entropy_fork.evaluation.checkpoint import Checkpoint
from entropy_fork.evaluation.tokenizer import load_tokenizer, tokenizer_checksum
from entropy_fork.tokens import store

#: A part ends with the answer that reaches one of these numbers. At most one part is in memory, and lost after a kill.
PART_TOKENS, PART_ANSWERS = 2**17, 256

DRAWN, MERGED, LOCK = "drawn", "merged", ".lock"


@dataclass(frozen=True)
class AnalysisSettings:
    """Everything that an analysis needs to know. One of ``prompts``, ``rollouts`` and ``like`` says what is measured.

    Attributes:
        model: a Hugging Face folder, or a checkpoint folder of verl.
        output: folder of tokens; continued if it has a part of this analysis.
        prompts: measure the model's own answers, drawn with these settings, whose ``output`` is not used.
        rollouts: folder of verl's dumps, see :class:`~entropy_fork.analysis.texts.Rollouts`.
        like: another folder of tokens, whose texts are measured.
        steps: only these steps of the rollouts; empty for all.
        limit: at most this many questions of ``prompts``, answers per step of ``rollouts``, or answers of ``like``.
        temperature: T of Eq. 1, above 0; None takes 1, or the T of ``like``. ``prompts`` has its own T.
        top_ratio: ρ, the share of all tokens that is marked as selected.
        dtype: type of the weights when measuring; ``auto`` is the type in which they are stored.
        batch_tokens: tokens of one forward pass.
        merged: where the Hugging Face folder of a sharded checkpoint is kept; None removes it at the end.
        tokenizer: a folder with the tokenizer; None takes the model's.

    Raises:
        EntropyForkError: a value has no meaning, or the source of the texts is not named, or more than once.
    """

    model: Path
    output: Path
    prompts: evaluation.EvaluationSettings | None = None
    rollouts: Path | None = None
    like: Path | None = None
    steps: tuple[int, ...] = ()
    limit: int | None = None
    temperature: float | None = None
    top_ratio: float = 0.2
    dtype: str = "auto"
    batch_tokens: int = 32768
    merged: Path | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("prompts", "rollouts", "like") if getattr(self, name) is not None]
        if len(given) != 1:
            raise EntropyForkError(
                f"say what is measured with one of --prompts, --rollouts and --like, not with "
                f"{' and '.join('--' + name for name in given) or 'none of them'}"
            )
        if self.steps and self.rollouts is None:
            raise EntropyForkError("--steps chooses steps of --rollouts, which is not given: leave --steps out")
        temperature = self.prompts.sampling.temperature if self.prompts else self.temperature
        if temperature is not None and temperature <= 0:
            raise EntropyForkError(
                f"temperature is {temperature}, and must be above 0: at 0 only the likeliest token is possible, and "
                f"there is no entropy to measure"
            )
        if self.dtype not in evaluation.DTYPES:
            raise EntropyForkError(f"dtype is {self.dtype!r}, and must be one of {', '.join(evaluation.DTYPES)}")
        for name in ("batch_tokens", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise EntropyForkError(f"{name} is {getattr(self, name)}, and must be at least 1")
        try:
            kept_count(1, self.top_ratio)
        except ValueError as error:
            raise EntropyForkError(str(error)) from error


def analyze(settings: AnalysisSettings, console: Console) -> dict[str, Any]:
    """Measure what has not been measured, and mark the top ρ.

    Returns:
        The folder's manifest.

    Raises:
        EntropyForkError: something that was asked for cannot be done; what is in the folder stays there.
    """
    checkpoint = Checkpoint.find(settings.model)
    for note in checkpoint.notes:
        console.print(visible(note), soft_wrap=True, highlight=False, markup=False)
    output = settings.output
    source, temperature = _source(settings, checkpoint)
    identity = {
        "texts": source.identity(),
        "model": checkpoint.fingerprint(),
        "temperature": temperature,
        "measured": {"dtype": settings.dtype, "batch_tokens": settings.batch_tokens},
    }
    if settings.tokenizer is not None:
        identity["tokenizer"] = tokenizer_checksum(settings.tokenizer)
    _check_free(output)
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK).open("a") as held:
        lock(held, output)
        manifest = _taken_up(output, identity)
        is_whole = manifest.get("complete") and _whole_parts(output)[1] == len(source)
        if is_whole and manifest["top_ratio"] == settings.top_ratio:
            return manifest
        manifest = {
            "source": source.kind,
            "complete": False,
            "model": str(checkpoint.path),
            "temperature": temperature,
            "top_ratio": settings.top_ratio,
            "pool": "all",
            "threshold": None,
            "identity": identity,
        }
        store.write_manifest(output, manifest)
        _measure(settings, checkpoint, source, temperature, console)
        with task(f"marking the top {settings.top_ratio:.0%} of all tokens", console=console):
            top = select_top(output, settings.top_ratio)
        counts = {"answers": len(source), "tokens": top.num_tokens, "selected": top.num_selected}
        store.write_manifest(output, manifest | {"complete": True, "threshold": top.threshold, **counts})
        for made in (DRAWN, MERGED):
            shutil.rmtree(output / made, ignore_errors=True)
        return store.read_manifest(output)


def _source(settings: AnalysisSettings, checkpoint: Checkpoint) -> tuple[TextSource, float]:
    """The source of the texts, and the T at which they are measured."""
    if settings.prompts is not None:
        drawing = replace(settings.prompts, output=settings.output / DRAWN)
        return Prompts(drawing, checkpoint, settings.limit), drawing.sampling.temperature
    if settings.rollouts is not None:
        asked = settings.temperature
        return Rollouts(settings.rollouts, settings.steps, settings.limit), 1.0 if asked is None else asked
    assert settings.like is not None
    if settings.like.absolute() == settings.output.absolute():
        raise EntropyForkError("--like and --output are the same folder: choose another --output")
    like = Like(settings.like, settings.limit)
    return like, like.manifest.get("temperature", 1.0) if settings.temperature is None else settings.temperature


def _check_free(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise EntropyForkError(f"{output} is a file: choose a folder with --output")
    if output.is_dir() and any(output.iterdir()) and not (output / store.MANIFEST).is_file():
        left = {entry.name for entry in output.iterdir()} - {LOCK}
        if left:
            raise EntropyForkError(f"{output} has files of something else: choose another folder with --output")


def _taken_up(output: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The manifest of what the folder has already; {} if it has nothing."""
    if not (output / store.MANIFEST).is_file():
        return {}
    manifest = store.read_manifest(output)
    if manifest["source"] == "training":
        raise EntropyForkError(f"{output} holds the tokens of a training run: choose another folder with --output")
    drawn = output / DRAWN / ANSWERS
    if store.parts(output) or (drawn.is_file() and drawn.stat().st_size):
        refuse_other(output, "tokens of another analysis", manifest["identity"], identity)
    return manifest


def _measure(
    settings: AnalysisSettings, checkpoint: Checkpoint, source: TextSource, temperature: float, console: Console
) -> None:
    output = settings.output
    first, start = _whole_parts(output)
    if start == len(source):
        return
    with task(f"reading {checkpoint.path} (verl merges shards)", console=console):
        folder = checkpoint.merge(settings.merged or output / MERGED)
    if isinstance(source, Prompts):
        source.draw(folder, console)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with task(f"loading {folder}", console=console):
        tokenizer = load_tokenizer(settings.tokenizer or folder)
        measurer = Measurer(folder, settings.dtype, temperature, settings.batch_tokens)
    with task("answers measured", len(source), completed=start, console=console) as shown:
        began, tokens = time.monotonic(), 0
        for number, texts in enumerate(_in_parts(source.texts(tokenizer, start)), start=first):
            store.write_part(output, number, _measured(measurer, texts))
            tokens += sum(len(text.ids.response) for text in texts)
            speed = tokens / (time.monotonic() - began)
            shown.advance(len(texts), f"{speed:,.0f} tokens/s")


def _whole_parts(output: Path) -> tuple[int, int]:
    """How many parts there are from the first one to the first gap, and how many answers are in them."""
    there = set(store.parts(output))
    number = next(number for number in range(len(there) + 1) if number not in there)
    return number, sum(store.num_answers(output, done) for done in range(number))


def _in_parts(texts: Iterable[Text]) -> Iterator[list[Text]]:
    part: list[Text] = []
    tokens = 0
    for text in texts:
        part.append(text)
        tokens += len(text.ids.response)
        if tokens >= PART_TOKENS or len(part) >= PART_ANSWERS:
            yield part
            part, tokens = [], 0
    if part:
        yield part


def _measured(measurer: Measurer, texts: list[Text]) -> list[store.AnswerTokens]:
    return [
        store.AnswerTokens(
            prompt=text.prompt,
            text=text.text,
            token_ids=text.ids.response,
            pieces=text.pieces,
            entropy=measured.entropy,
            log_prob=measured.log_prob,
            rank=measured.rank,
            answer=text.answer,
            step=text.step,
            data_source=text.data_source,
            ground_truth=text.ground_truth,
            score=text.score,
            truncated=text.truncated,
            prompt_ids=text.ids.prompt,
        )
        for text, measured in zip(texts, measurer.measure([text.ids for text in texts]), strict=True)
    ]
