"""What ``entropy-fork evaluate`` does: answer the questions, score the answers, summarise the scores."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import entropy_fork
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.foreign_text import visible
from entropy_fork.common.progress import task
from entropy_fork.common.recipes import preset_names
from entropy_fork.core.randomness import seed_of
from entropy_fork.data.template import chat_template as template_of_recipes
from entropy_fork.evaluation.answer_store import AnswerStore, ScoredAnswer
from entropy_fork.evaluation.checkpoint import Checkpoint, ModelRecord, code_refused
from entropy_fork.evaluation.engines import (
    AnswerJob,
    Engine,
    Generated,
    SamplingSettings,
    TransformersEngine,
    VllmEngine,
    choose_engine,
)
from entropy_fork.evaluation.questions import Question, checksum, read_questions
from entropy_fork.evaluation.statistics import BenchmarkSummary, summarise_benchmark
from entropy_fork.evaluation.tokenizer import load_tokenizer, tokenizer_checksum
from entropy_fork.reward import compute_score
from entropy_fork.reward.convention import convention_of

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything that an evaluation needs to know.

    Attributes:
        model: a Hugging Face folder, a checkpoint folder of verl, or the folder of a run's checkpoints.
        data: parquet files in verl's format.
        output: folder for answers and results; continued if it has a part of this evaluation.
        answers: k, answers per question.
        sampling: how answers are drawn.
        engine: ``auto``, ``vllm`` or ``transformers``.
        chat_template: a name of the Hydra group ``template`` (``paper``, ``chat``), a file with a Jinja template, or
            the template itself; None takes the tokenizer's.
        dtype: type of the weights when answering; ``auto`` is the type in which they are stored.
        merged: where the Hugging Face folder of a sharded checkpoint is kept; None removes it at the end.
        batch_size: for the transformers engine: answers at once.
        tensor_parallel, vllm: for the vLLM engine, see :class:`~entropy_fork.evaluation.engines.VllmEngine`.
        tokenizer: a folder with the tokenizer; None takes the model's.

    Raises:
        EntropyForkError: a value has no meaning.
    """

    model: Path
    data: Sequence[Path]
    output: Path
    answers: int = 16
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    engine: str = "auto"
    chat_template: str | None = None
    dtype: str = "auto"
    merged: Path | None = None
    batch_size: int = 64
    tensor_parallel: int = 1
    vllm: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        for name in ("answers", "batch_size", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise EntropyForkError(f"{name} is {getattr(self, name)}, and must be at least 1")
        if self.dtype not in DTYPES:
            raise EntropyForkError(f"dtype is {self.dtype!r}, and must be one of {', '.join(DTYPES)}")
        if self.sampling.is_greedy and self.answers > 1:
            raise EntropyForkError(
                f"at temperature 0 all {self.answers} answers to a question are the same: write --answers 1"
            )


@dataclass(frozen=True)
class Evaluation:
    """The result: the identity of the manifest, a summary per benchmark in the order of the data, and the model."""

    identity: dict[str, Any]
    benchmarks: dict[str, BenchmarkSummary]
    model: ModelRecord


def evaluate(
    settings: EvaluationSettings, console: Console, opening: Callable[..., Opened] | None = None
) -> Evaluation:
    """Answer what has not been answered yet, and summarise all answers.

    Args:
        settings: the model, the data, how to answer, and where to write.
        console: where progress is shown.
        opening: called in place of :func:`open_engine`, if there is something to answer.

    Raises:
        EntropyForkError: something that was asked for cannot be done; raised before any answer is drawn.
    """
    questions = read_questions(settings.data)
    checkpoint = Checkpoint.find(settings.model)
    for note in checkpoint.notes:
        console.print(visible(note), soft_wrap=True, highlight=False, markup=False)
    engine_name = choose_engine(settings.engine)
    template = read_template(settings.chat_template)
    identity = identity_of(settings, checkpoint, engine_name, questions, template)
    identity["reward"] = f"entropy_fork.reward {entropy_fork.__version__}"
    record = checkpoint.record
    notes = {"model": record.as_dict(), "data": [str(file.absolute()) for file in settings.data]}
    with AnswerStore(settings.output, identity, notes, ScoredAnswer) as store:
        wanted = {(index, sample) for sample in range(settings.answers) for index in range(len(questions))}
        if missing := wanted - store.records.keys():
            if settings.tokenizer is None and checkpoint.backend != "huggingface":
                load_tokenizer(checkpoint.tokenizer_folder, _is_trusted(settings))  # before shards are merged
            with task(f"reading {checkpoint.path} (verl merges shards)", console=console):
                folder = checkpoint.merge(settings.merged or settings.output / "merged")
            with task(f"loading {folder} into {engine_name}", console=console):
                opened = (opening or open_engine)(settings, engine_name, folder, template, questions)
            _answer(opened, questions, store, missing, console)
        if settings.merged is None:
            shutil.rmtree(settings.output / "merged", ignore_errors=True)
        return Evaluation(identity, _summaries(questions, store, settings.answers), record)


def identity_of(
    settings: EvaluationSettings,
    checkpoint: Checkpoint,
    engine_name: str,
    questions: Sequence[Question],
    template: str | None,
) -> dict[str, Any]:
    """Everything that decides which answers are drawn."""
    return {
        "model": checkpoint.fingerprint(),
        "questions": checksum(questions),
        "chat_template": "the model's" if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "sampling": asdict(settings.sampling),
        "engine": {"name": engine_name, "dtype": settings.dtype}
        | ({"batch_size": settings.batch_size} if engine_name == "transformers" else {}),
        **({} if settings.tokenizer is None else {"tokenizer": tokenizer_checksum(settings.tokenizer)}),
    }


def read_template(chat_template: str | None) -> str | None:
    """The Jinja text of a chat template; None is the tokenizer's own.

    Args:
        chat_template: a name of the Hydra group ``template``, a file with a Jinja template, or the template itself.

    Raises:
        EntropyForkError: the argument is none of these.
    """
    if chat_template is None or "{" in chat_template:
        return chat_template
    if chat_template in preset_names("template"):
        return template_of_recipes(chat_template)
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except OSError as error:
        names = ", ".join(preset_names("template"))
        raise EntropyForkError(
            f"--chat-template {chat_template} is neither a name ({names}) nor a file nor a Jinja template"
        ) from error


def prompts(tokenizer: Any, questions: Sequence[Question], template: str | None) -> list[tuple[int, ...]]:
    """Token ids of each prompt, through the chat template as verl applies it in training.

    Raises:
        EntropyForkError: the tokenizer has no chat template and none is given, or the template fails.
    """
    from jinja2 import TemplateError  # transformers needs it for chat templates

    if template is not None:
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise EntropyForkError("the model's tokenizer has no chat template: name the one of the training with "
                               "--chat-template FILE")  # fmt: skip
    try:
        texts = [
            tokenizer.apply_chat_template(list(question.prompt), add_generation_prompt=True, tokenize=False)
            for question in questions
        ]
    except TemplateError as error:  # raised also for what transformers' sandbox forbids
        raise EntropyForkError(f"the chat template cannot be applied: {type(error).__name__}: {error}") from error
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def end_token_ids(tokenizer: Any, folder: Path) -> list[int]:
    """The tokenizer's end token and those of the model's generation config.

    Raises:
        EntropyForkError: there is no end token.
    """
    from transformers import GenerationConfig

    ids = [tokenizer.eos_token_id]
    if (folder / "generation_config.json").is_file():
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
        ids += configured if isinstance(configured, list) else [configured]
    if found := sorted({token for token in ids if token is not None}):
        return found
    raise EntropyForkError(f"{folder} names no end token, neither in its tokenizer nor in generation_config.json")


#: a model that is ready to answer, all jobs for it, and its tokenizer
Opened = tuple[Engine, list[AnswerJob], Any]


def open_engine(
    settings: EvaluationSettings, engine_name: str, folder: Path, template: str | None, questions: Sequence[Question]
) -> Opened:
    """Load a model that is ready to answer, with all jobs for it and its tokenizer.

    Raises:
        EntropyForkError: there is no tokenizer, or it has no chat template or no end token, or it belongs to another
            model, or the model has too few positions; raised before the weights are loaded.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    trusted = _is_trusted(settings)
    with code_refused(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    tokenizer = load_tokenizer(settings.tokenizer or folder, trusted)
    end_ids = end_token_ids(tokenizer, folder)
    prompt_ids = prompts(tokenizer, questions, template)
    longest = max(map(len, prompt_ids))
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and (highest := max([0, *map(max, filter(None, prompt_ids))])) >= vocabulary:
        raise EntropyForkError(
            f"the tokenizer in {settings.tokenizer or folder} gives a prompt the token {highest}, but the model has "
            f"{vocabulary} tokens: name the model's own tokenizer with --tokenizer FOLDER"
        )
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and longest + settings.sampling.max_tokens > room:
        raise EntropyForkError(
            f"the longest prompt has {longest} tokens and an answer up to {settings.sampling.max_tokens}, but the "
            f"model has {room} positions: write --max-tokens {max(1, room - longest)} or less"
        )
    dtype = settings.dtype
    if dtype == "auto":
        dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    jobs = [
        AnswerJob(index, sample, seed_of(settings.sampling.seed, index, sample), prompt_ids[index])
        for sample in range(settings.answers)
        for index in range(len(questions))
    ]
    engine: Engine
    if engine_name == "vllm":
        engine = VllmEngine(
            folder,
            settings.sampling,
            dtype,
            end_ids,
            longest + settings.sampling.max_tokens,
            settings.tensor_parallel,
            settings.vllm,
            settings.tokenizer,
        )
    else:
        engine = TransformersEngine(folder, settings.sampling, dtype, end_ids, settings.batch_size)
    return engine, jobs, tokenizer


def _is_trusted(settings: EvaluationSettings) -> bool:
    return bool(settings.vllm.get("trust_remote_code", False))


def _answer(
    opened: Opened,
    questions: Sequence[Question],
    store: AnswerStore[ScoredAnswer],
    missing: set[tuple[int, int]],
    console: Console,
) -> None:
    engine, jobs, tokenizer = opened

    def scored(generated: Generated) -> ScoredAnswer:
        job, question = generated.job, questions[generated.job.question]
        text = tokenizer.decode(generated.token_ids, skip_special_tokens=True)
        source = question.data_source
        reward = compute_score(source, text, question.ground_truth, convention=convention_of(source))
        return ScoredAnswer(
            job.question,
            job.sample,
            job.seed,
            question.data_source,
            len(generated.token_ids),
            generated.truncated,
            reward["score"],
            bool(reward["format"]),
            text,
            generated.above,
        )

    with task("answers", len(jobs), completed=len(jobs) - len(missing), console=console) as shown:
        began, tokens = time.monotonic(), 0
        right = sum(record.score for record in store.records.values())
        for batch in engine.answers(jobs, lambda job: (job.question, job.sample) in missing):
            records = [scored(generated) for generated in batch]
            store.append(records)
            tokens += sum(record.tokens for record in records)
            right += sum(record.score for record in records)
            share, speed = right / len(store.records), tokens / (time.monotonic() - began)
            shown.advance(len(records), f"{share:.1%} right  {speed:,.0f} tokens/s")


def _summaries(questions: Sequence[Question], store: AnswerStore[ScoredAnswer], k: int) -> dict[str, BenchmarkSummary]:
    """A summary per data source, over the first k answers to each question."""
    summaries = {}
    for name in dict.fromkeys(question.data_source for question in questions):
        rows = [
            [store.records[index, sample] for sample in range(k)]
            for index, question in enumerate(questions)
            if question.data_source == name
        ]

        def table(attribute: str, rows: list[list[ScoredAnswer]] = rows) -> np.ndarray:
            return np.array([[getattr(record, attribute) for record in row] for row in rows])

        has_above = all(record.above is not None for row in rows for record in row)
        summaries[name] = summarise_benchmark(
            table("score") == 1.0,
            table("tokens"),
            table("truncated"),
            table("boxed"),
            table("above") if has_above else None,
        )
    return summaries
