"""Build the CPU demo's world: a tokenizer, a tiny Qwen3 warmed up on demonstrations, and the problems as parquet.

The same settings give the same result. One rename at the end puts the result in place, so an interrupted build is never
taken for a finished one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

from entropy_fork.common.cores import share_cores, waiting_passively

os.environ.update(waiting_passively(os.environ))  # before torch is imported: OpenMP reads it once

import torch
import typer
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from entropy_fork.common.progress import task, track
from examples.cpu_demo.rollouts import Score, roll_out, score
from examples.cpu_demo.world import Problem, demonstrate, draw_problems

DATA_SOURCE = "cpu_demo"
EOS, PAD = "<|endoftext|>", "<|pad|>"
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>"]
"""Not used here, but verl's agent loops expect them in the tokenizer of a model of type qwen3."""

MANIFEST = "manifest.json"
FORMAT = 2
"""Increase this number when the world or the model changes, so that an older build is not taken for a current one."""

MAX_VOCABULARY = 512
"""Not reached: merging stops when every word, operation and digit of the tiny corpus is a token."""

TOKEN_PATTERN = r" ?[+*-]\d|\d| ?\\boxed\{| ?\p{L}+|\s|[^\s\p{L}\d]"
"""How text is cut before merging.

An operation is one piece, so that choosing it is one token. Each digit is one piece, so that the model spells numbers
and does not memorise them. The newline that ends the prompt is one piece too, so that a response has the same tokens
with and without its prompt.
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'User:\n' + message.content + '\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Assistant:\n' + message.content + eos_token }}"
    "{% elif message.role == 'system' %}{{ message.content + '\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Settings:
    """All settings that the result depends on."""

    seed: int = 0
    steps: int = 750
    batch_size: int = 32
    learning_rate: float = 3e-3
    hint_rate: float = 0.25
    operation_counts: tuple[int, ...] = (3, 3, 4)
    warmup_problems: int = 6000
    train_problems: int = 2048
    test_problems: int = 256
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 3
    format: int = FORMAT

    @property
    def checksum(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Problems:
    """Three disjoint sets: demonstrated in the warm-up, for reinforcement learning, and for evaluation."""

    warmup: list[Problem]
    train: list[Problem]
    test: list[Problem]


@dataclass(frozen=True)
class Report:
    """Measurements of a build."""

    parameters: int
    vocabulary: int
    warmup_seconds: float
    warmup_loss: float
    sampled: Score
    greedy: Score


class BuildMismatchError(Exception):
    """The output directory holds something other than a build with the settings asked for."""


def split_problems(settings: Settings) -> Problems:
    """Draw all problems from one stream without duplicates, so that the sets are disjoint."""
    stream = draw_problems(random.Random(settings.seed), settings.operation_counts)
    return Problems(
        test=list(islice(stream, settings.test_problems)),
        train=list(islice(stream, settings.train_problems)),
        warmup=list(islice(stream, settings.warmup_problems)),
    )


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that can spell any text and has a token for each word and operation of the task."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[EOS, PAD, *QWEN_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=QWEN_TOKENS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """An untrained Qwen3 whose vocabulary is exactly the tokenizer's."""
    head_dim = 64
    heads = settings.hidden_size // head_dim
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    return model


def conversation(problem: Problem, response: str | None = None) -> list[dict[str, str]]:
    user = {"role": "user", "content": problem.prompt}
    return [user] if response is None else [user, {"role": "assistant", "content": response}]


def collate(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem], rng: random.Random, hint_rate: float
) -> dict[str, torch.Tensor]:
    """A padded batch of fresh demonstrations whose labels are the response tokens, eos included."""
    prompts = tokenizer.apply_chat_template(
        [conversation(problem) for problem in problems], add_generation_prompt=True, tokenize=False
    )
    wholes = tokenizer.apply_chat_template(
        [conversation(problem, demonstrate(problem, rng, hint_rate)) for problem in problems], tokenize=False
    )
    batch = tokenizer(wholes, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    prompt_lengths = torch.tensor([len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]])
    positions = torch.arange(batch["input_ids"].shape[1])
    unlearnt = (positions < prompt_lengths[:, None]) | (batch["attention_mask"] == 0)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": batch["input_ids"].masked_fill(unlearnt, IGNORED_LABEL),
    }


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    settings: Settings,
    console: Console,
) -> float:
    """Teach form and arithmetic by plain supervised learning; returns the mean loss of the last tenth of the steps."""
    rng = random.Random(settings.seed + 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.steps // 20, settings.steps)
    losses = []
    model.train()
    with task("warm-up", settings.steps, console=console) as shown:
        for _ in range(settings.steps):
            batch = collate(tokenizer, rng.sample(problems, settings.batch_size), rng, settings.hint_rate)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            shown.advance(note=f"loss {losses[-1]:.3f}")
    model.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def write_parquet(problems: list[Problem], split: str, path: Path) -> None:
    """Write problems in the schema of verl's RLHFDataset and its rule-based reward."""
    rows = [
        {
            "data_source": DATA_SOURCE,
            "prompt": conversation(problem),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
            "extra_info": {
                "split": split,
                "index": index,
                "start": problem.start,
                "operations": [str(operation) for operation in problem.operations],
                "goal": problem.goal.value,
            },
        }
        for index, problem in enumerate(problems)
    ]
    Dataset.from_list(rows).to_parquet(path)


def is_built(output: Path, settings: Settings) -> bool:
    """Whether `output` is the finished build with these settings; raises if it is anything else."""
    if not output.exists():
        return False
    manifest = output / MANIFEST
    if not manifest.is_file():
        raise BuildMismatchError(f"{output} exists but is no finished build of this demo")
    if json.loads(manifest.read_text())["checksum"] != settings.checksum:
        raise BuildMismatchError(f"{output} was built with other settings")
    return True


def put_in_place(finished: Path, output: Path) -> None:
    """Rename a finished build to its final name, moving a predecessor out of the way and then deleting it."""
    if output.exists():
        discarded = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
        output.rename(discarded / output.name)
        finished.rename(output)
        shutil.rmtree(discarded)
    else:
        finished.rename(output)


def build(output: Path, settings: Settings, console: Console, *, overwrite: bool = False) -> Report | None:
    """Build the world at `output`, or return None if it already stands there."""
    output = output.absolute()
    if not overwrite and is_built(output, settings):
        return None
    output.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{output.name}.new.", dir=output.parent))
    try:
        with task("the demo's world", console=console):
            report = build_into(workspace, settings, console)
        workspace.chmod(0o755)
        put_in_place(workspace, output)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return report


def build_into(folder: Path, settings: Settings, console: Console) -> Report:
    """Do the work of `build` in a temporary folder; the manifest is written last."""
    set_seed(settings.seed)
    problems = split_problems(settings)
    write_parquet(problems.train, "train", folder / "train.parquet")
    write_parquet(problems.test, "test", folder / "test.parquet")

    rng = random.Random(settings.seed)
    tokenizer = train_tokenizer(
        f"User:\n{problem.prompt}\nAssistant:\n{demonstrate(problem, rng, settings.hint_rate)}"
        for problem in [*problems.warmup, *problems.train]
    )
    model = make_model(settings, tokenizer)
    began = time.monotonic()
    loss = warm_up(model, tokenizer, problems.warmup, settings, console)
    seconds = time.monotonic() - began
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    questions = [problem.prompt for problem in problems.test]
    sampled, greedy = (
        score(problems.test, roll_out(model, tokenizer, questions, greedy=is_greedy), tokenizer.eos_token_id)
        for is_greedy in track("answers to the test's problems", (False, True), console=console)
    )
    report = Report(
        parameters=model.num_parameters(),
        vocabulary=len(tokenizer),
        warmup_seconds=seconds,
        warmup_loss=loss,
        sampled=sampled,
        greedy=greedy,
    )
    manifest = {"checksum": settings.checksum, "settings": asdict(settings), "report": asdict(report)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return report


def summary(report: Report) -> Table:
    table = Table("measure", "sampled (T=1)", "greedy", title="Build of the CPU demo")
    table.add_row("parameters", f"{report.parameters:,}", "")
    table.add_row("vocabulary", str(report.vocabulary), "")
    table.add_row("warm-up seconds", f"{report.warmup_seconds:.0f}", "")
    table.add_row("warm-up loss", f"{report.warmup_loss:.3f}", "")
    table.add_section()
    for label, attribute in (
        ("accuracy (math-verify)", "accuracy"),
        ("right arithmetic", "right_arithmetic"),
        ("within the rules", "within_rules"),
        ("ended by eos", "finished"),
    ):
        table.add_row(label, *(f"{getattr(run, attribute):.1%}" for run in (report.sampled, report.greedy)))
    table.add_row("response tokens, mean", *(f"{run.mean_tokens:.1f}" for run in (report.sampled, report.greedy)))
    return table


def main(
    output: Annotated[Path, typer.Option(help="Directory to create, with model/, train.parquet and test.parquet.")],
    seed: int = Settings.seed,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the supervised warm-up.")] = Settings.steps,
    batch_size: Annotated[int, typer.Option(min=1)] = Settings.batch_size,
    learning_rate: float = Settings.learning_rate,
    hint_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of demonstrations whose order is an optimal one.")
    ] = Settings.hint_rate,
    train_problems: Annotated[int, typer.Option(min=1)] = Settings.train_problems,
    test_problems: Annotated[int, typer.Option(min=1)] = Settings.test_problems,
    warmup_problems: Annotated[int, typer.Option(min=1)] = Settings.warmup_problems,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default, one per core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace whatever stands at the output.")] = False,
) -> None:
    """Build the tiny model and the problems of the CPU demo."""
    console = Console()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        share_cores()
    settings = Settings(
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        hint_rate=hint_rate,
        train_problems=train_problems,
        test_problems=test_problems,
        warmup_problems=warmup_problems,
    )
    try:
        report = build(output, settings, console, overwrite=overwrite)
    except BuildMismatchError as error:
        raise typer.BadParameter(f"{error}; choose another --output or pass --overwrite") from error
    if report is None:
        console.print(f"{output} is already built with these settings.")
    else:
        console.print(summary(report))


if __name__ == "__main__":
    typer.run(main)
