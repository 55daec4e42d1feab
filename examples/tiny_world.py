"""Build a tiny world: a tokenizer, a tiny Qwen3 warmed up on demonstrations, and problems as parquet in verl's schema.

A task of its own is a `World`: how its problems are drawn, demonstrated and scored. Everything else is here.

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

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

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.progress import task, track
from entropy_fork.reward import compute_score

EOS, PAD = "<|endoftext|>", "<|pad|>"
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>"]
"""Not used here, but verl's agent loops expect them in the tokenizer of a model of type qwen3."""

MANIFEST = "manifest.json"

MAX_VOCABULARY = 512
"""Not reached: merging stops when every piece of the tiny corpus is a token."""

MAX_NEW_TOKENS = 64

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'User:\n' + message.content + '\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Assistant:\n' + message.content + eos_token }}"
    "{% elif message.role == 'system' %}{{ message.content + '\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

IGNORED_LABEL = -100

Made = TypeVar("Made")


@dataclass(frozen=True)
class Settings:
    """All settings that the result depends on. A world's own settings are a subclass."""

    seed: int = 0
    steps: int = 750
    batch_size: int = 32
    learning_rate: float = 3e-3
    hint_rate: float = 0.25
    warmup_problems: int = 6000
    train_problems: int = 2048
    test_problems: int = 256
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 3
    format: int = 1
    """Increase this number when the world or the model changes, so that no older build is taken for a current one."""

    @property
    def checksum(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Problem(Protocol):
    """A question with a checkable answer."""

    @property
    def prompt(self) -> str: ...


@dataclass(frozen=True)
class Problems:
    """Three disjoint sets: demonstrated in the warm-up, for reinforcement learning, and for evaluation."""

    warmup: list[Any]
    train: list[Any]
    test: list[Any]


@dataclass(frozen=True)
class World:
    """A task for the tiny model.

    Attributes:
        name: as people call it.
        data_source: the column that tells the reward how to score.
        ability: verl's column of this name.
        settings: what a build has unless another value is asked for.
        token_pattern: how text is cut before merging, as a regular expression of a piece.
        split: draws the problems.
        demonstrate: a response that is right in form; the probability of a right choice is the last argument.
        ground_truth: what the reward compares a response with.
        facts: further columns of a problem, under ``extra_info``.
        checks: named verdicts on a response, beside the reward's.
    """

    name: str
    data_source: str
    ability: str
    settings: Settings
    token_pattern: str
    split: Callable[[Any], Problems]
    demonstrate: Callable[[Any, random.Random, float], str]
    ground_truth: Callable[[Any], str]
    facts: Callable[[Any], dict[str, Any]]
    checks: Callable[[Any, str], dict[str, bool]]


@dataclass(frozen=True)
class Rollout:
    """One sampled response, with the token ids the model saw and produced (the response's end in eos)."""

    prompt_ids: list[int]
    response_ids: list[int]
    text: str


@dataclass(frozen=True)
class Report:
    """Measurements of a build. `sampled` and `greedy` are averages over the test's problems."""

    parameters: int
    vocabulary: int
    warmup_seconds: float
    warmup_loss: float
    sampled: dict[str, float]
    greedy: dict[str, float]


class BuildMismatchError(Exception):
    """The output directory holds something other than a build with the settings asked for."""


def train_tokenizer(texts: Iterator[str], pattern: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that can spell any text and has a token for each piece of the task's texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
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
    world: World, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], rng: random.Random, hint_rate: float
) -> dict[str, torch.Tensor]:
    """A padded batch of fresh demonstrations whose labels are the response tokens, eos included."""
    prompts = tokenizer.apply_chat_template(
        [conversation(problem) for problem in problems], add_generation_prompt=True, tokenize=False
    )
    wholes = tokenizer.apply_chat_template(
        [conversation(problem, world.demonstrate(problem, rng, hint_rate)) for problem in problems], tokenize=False
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
    world: World,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    settings: Settings,
    console: Console,
) -> float:
    """Teach form by plain supervised learning; returns the mean loss of the last tenth of the steps."""
    rng = random.Random(settings.seed + 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.steps // 20, settings.steps)
    losses = []
    model.train()
    with task("warm-up", settings.steps, console=console) as shown:
        for _ in range(settings.steps):
            batch = collate(world, tokenizer, rng.sample(problems, settings.batch_size), rng, settings.hint_rate)
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


@torch.inference_mode()
def roll_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], *, greedy: bool = False
) -> list[Rollout]:
    """Answer every question once, at temperature 1 over the whole vocabulary unless `greedy`."""
    conversations = [[{"role": "user", "content": question}] for question in questions]
    batch = tokenizer.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    # top_k=0: the library's own default would cut the distribution whose entropy is of interest.
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, **sampling)
    rollouts = []
    width = batch["input_ids"].shape[1]
    for prompt_ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], output, strict=True):
        response_ids = row[width:].tolist()
        if tokenizer.eos_token_id in response_ids:
            response_ids = response_ids[: response_ids.index(tokenizer.eos_token_id) + 1]
        text = tokenizer.decode(response_ids, skip_special_tokens=True)
        rollouts.append(Rollout(prompt_ids[mask.bool()].tolist(), response_ids, text))
    return rollouts


def score(world: World, problems: list[Problem], rollouts: list[Rollout], eos_token_id: int) -> dict[str, float]:
    """Judge one rollout per problem, and average: the reward's verdict, the world's own checks, length and end."""
    judged = [
        {
            "accuracy": is_correct(world.data_source, rollout.text, world.ground_truth(problem)),
            **world.checks(problem, rollout.text),
            "mean_tokens": len(rollout.response_ids),
            "finished": rollout.response_ids[-1] == eos_token_id,
        }
        for problem, rollout in zip(problems, rollouts, strict=True)
    ]
    return {name: sum(each[name] for each in judged) / len(judged) for name in judged[0]}


def is_correct(data_source: str, response: str, ground_truth: str) -> bool:
    """Whether the reward of the training is 1."""
    return compute_score(data_source, response, ground_truth)["acc"] == 1.0


def write_parquet(world: World, problems: list[Problem], split: str, path: Path) -> None:
    """Write problems in the schema of verl's RLHFDataset and its rule-based reward."""
    rows = [
        {
            "data_source": world.data_source,
            "prompt": conversation(problem),
            "ability": world.ability,
            "reward_model": {"style": "rule", "ground_truth": world.ground_truth(problem)},
            "extra_info": {"split": split, "index": index, **world.facts(problem)},
        }
        for index, problem in enumerate(problems)
    ]
    Dataset.from_list(rows).to_parquet(path)


def is_built(output: Path, checksum: str) -> bool:
    """Whether `output` is the finished build of the settings with this checksum; raises if it is anything else."""
    if not output.exists():
        return False
    manifest = output / MANIFEST
    if not manifest.is_file():
        raise BuildMismatchError(f"{output} exists but is no finished build of a world")
    if json.loads(manifest.read_text())["checksum"] != checksum:
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


def build_once(output: Path, checksum: str, write: Callable[[Path], Made], *, overwrite: bool = False) -> Made | None:
    """Let `write` fill a temporary folder, and rename it to `output`; or return None if that stands there already."""
    output = output.absolute()
    if not overwrite and is_built(output, checksum):
        return None
    output.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{output.name}.new.", dir=output.parent))
    try:
        report = write(workspace)
        workspace.chmod(0o755)
        put_in_place(workspace, output)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return report


def build(
    world: World, output: Path, settings: Settings, console: Console, *, overwrite: bool = False
) -> Report | None:
    """Build the world at `output`, or return None if it already stands there."""

    def write(folder: Path) -> Report:
        with task(f"the world of the {world.name}", console=console):
            return build_into(world, folder, settings, console)

    return build_once(output, settings.checksum, write, overwrite=overwrite)


def build_into(world: World, folder: Path, settings: Settings, console: Console) -> Report:
    """Do the work of `build` in a temporary folder; the manifest is written last."""
    set_seed(settings.seed)
    problems = world.split(settings)
    write_parquet(world, problems.train, "train", folder / "train.parquet")
    write_parquet(world, problems.test, "test", folder / "test.parquet")

    rng = random.Random(settings.seed)
    tokenizer = train_tokenizer(
        (
            f"User:\n{problem.prompt}\nAssistant:\n{world.demonstrate(problem, rng, settings.hint_rate)}"
            for problem in [*problems.warmup, *problems.train]
        ),
        world.token_pattern,
    )
    model = make_model(settings, tokenizer)
    began = time.monotonic()
    loss = warm_up(world, model, tokenizer, problems.warmup, settings, console)
    seconds = time.monotonic() - began
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    questions = [problem.prompt for problem in problems.test]
    sampled, greedy = (
        score(world, problems.test, roll_out(model, tokenizer, questions, greedy=is_greedy), tokenizer.eos_token_id)
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


def summary(world: World, report: Report) -> Table:
    table = Table("measure", "sampled (T=1)", "greedy", title=f"Build of the {world.name}")
    table.add_row("parameters", f"{report.parameters:,}", "")
    table.add_row("vocabulary", str(report.vocabulary), "")
    table.add_row("warm-up seconds", f"{report.warmup_seconds:.0f}", "")
    table.add_row("warm-up loss", f"{report.warmup_loss:.3f}", "")
    table.add_section()
    words = {"accuracy": "accuracy (the reward)", "finished": "ended by eos", "mean_tokens": "response tokens, mean"}
    for name in report.sampled:
        form = ".1f" if name == "mean_tokens" else ".1%"
        table.add_row(
            words.get(name, name.replace("_", " ")),
            *(format(run[name], form) for run in (report.sampled, report.greedy)),
        )
    return table


def command(world: World) -> Callable[..., None]:
    """The command that builds a world, for typer."""
    default = world.settings

    def main(
        output: Annotated[Path, typer.Option(help="Directory to create, with model/, train.parquet and test.parquet.")],
        seed: int = default.seed,
        steps: Annotated[int, typer.Option(min=1, help="Steps of the supervised warm-up.")] = default.steps,
        batch_size: Annotated[int, typer.Option(min=1)] = default.batch_size,
        learning_rate: float = default.learning_rate,
        hint_rate: Annotated[
            float, typer.Option(min=0, max=1, help="Share of demonstrations whose choices are right.")
        ] = default.hint_rate,
        train_problems: Annotated[int, typer.Option(min=1)] = default.train_problems,
        test_problems: Annotated[int, typer.Option(min=1)] = default.test_problems,
        warmup_problems: Annotated[int, typer.Option(min=1)] = default.warmup_problems,
        threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default, one per core.")] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace whatever stands at the output.")] = False,
    ) -> None:
        """Build the tiny model and the problems."""
        console = Console()
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        elif "OMP_NUM_THREADS" not in os.environ:
            share_cores()
        settings = replace(
            default,
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
            report = build(world, output, settings, console, overwrite=overwrite)
        except BuildMismatchError as error:
            raise typer.BadParameter(f"{error}; choose another --output or pass --overwrite") from error
        except EntropyForkError as error:
            raise SystemExit(str(error)) from None
        if report is None:
            console.print(f"{output} is already built with these settings.")
        else:
            console.print(summary(world, report))

    return main
