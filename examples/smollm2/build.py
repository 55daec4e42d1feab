"""Build the world of SmolLM2's run: sums of reasoning-gym, and the model after a short supervised warm-up.

The warm-up shows two ways to answer a sum: the answer at once, or one step after the other. The model learns both, and
is undecided between them. Reinforcement learning has to find out which one pays.

The same settings give the same result. One rename at the end puts it in place, so an interrupted build is never taken
for a finished one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from entropy_fork.common.cores import share_cores, waiting_passively

os.environ.update(waiting_passively(os.environ))  # before torch is imported: OpenMP reads it once

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.progress import task
from entropy_fork.data.generated import Wanted, prepare_generated
from entropy_fork.data.prepare import SCHEMA
from entropy_fork.models.fetch import fetch
from examples.tiny_world import IGNORED_LABEL, MANIFEST, BuildMismatchError, build_once

MODEL = "smollm2"
TASK = "chain_sum"

FORMAT = 1
"""Increase this number when the world changes, so that an older build is not taken for a current one."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The model's own without its standing system message, which would be a third of each prompt."""

_TERM = re.compile(r"([+-]?) ?(\d+)")

_CARD = """# SmolLM2-135M-Instruct, warmed up on sums

Made by `python -m examples.smollm2.build` of entropy-fork, from what `entropy-fork model fetch smollm2` writes.
**These are not the published weights**: they are four-bit ones turned back into floats, and were then trained for
{steps} steps on {demonstrations:,} written solutions of one-digit sums. The chat template has no system message.
The licence of the original, Apache-2.0, is in `LICENSE`.
"""


@dataclass(frozen=True)
class Settings:
    """All settings that the result depends on."""

    seed: int = 0
    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 1.5e-4
    direct_rate: float = 0.5
    min_terms: int = 3
    max_terms: int = 4
    warmup_problems: int = 800
    train_problems: int = 1024
    test_problems: int = 128
    instruction: str = "Put the answer in \\boxed{}."
    format: int = FORMAT

    @property
    def checksum(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def options(self) -> dict[str, Any]:
        """The options of reasoning-gym's task."""
        return {"min_terms": self.min_terms, "max_terms": self.max_terms, "min_digits": 1, "max_digits": 1}


@dataclass(frozen=True)
class Report:
    """Measurements of a build. The loss is in nats per token of the answers."""

    parameters: int
    warmup_seconds: float
    warmup_tokens: int
    warmup_loss: float


def solution(question: str, direct: bool) -> str:
    """A right answer to a sum: at once, or with every step before it.

    Raises:
        ValueError: the question is no chain of sums, or its steps do not lead to a number.
    """
    sum_ = question.partition(":")[2].partition("=")[0].strip()
    terms = [(sign, int(number)) for sign, number in _TERM.findall(sum_)]
    if len(terms) < 2 or any(bool(sign) != bool(place) for place, (sign, _) in enumerate(terms)):
        raise ValueError(f"no chain of sums: {question!r}")
    value, steps = terms[0][1], []
    for sign, number in terms[1:]:
        after = value + number if sign == "+" else value - number
        steps.append(f"{value} {sign} {number} = {after}.")
        value = after
    return " ".join([*([] if direct else steps), f"\\boxed{{{value}}}"])


def write_problems(folder: Path, settings: Settings, console: Console) -> list[dict[str, Any]]:
    """Write train.parquet and test.parquet, and return the rows of the warm-up. No question is in two of them."""
    wanted = Wanted(
        tasks=(TASK,),
        size=settings.warmup_problems + settings.train_problems,
        holdout=settings.test_problems,
        seed=settings.seed,
        options={TASK: settings.options},
        template=settings.instruction,
        name="questions",
    )
    prepare_generated(wanted, folder, console)
    questions = folder / wanted.name
    rows = pq.read_table(questions / "train.parquet").to_pylist()
    warmup, train = rows[: settings.warmup_problems], rows[settings.warmup_problems :]
    pq.write_table(pa.Table.from_pylist(train, schema=SCHEMA), folder / "train.parquet")
    (questions / "test.parquet").rename(folder / "test.parquet")
    shutil.rmtree(questions)
    return warmup


def demonstrations(rows: list[dict[str, Any]], settings: Settings) -> list[list[tuple[str, str]]]:
    """The batches of the warm-up: pairs of a user's message and an answer, the same share of direct ones in each."""
    rng = random.Random(settings.seed + 1)
    num_direct = round(settings.batch_size * settings.direct_rate)
    batches = []
    for _ in range(settings.steps):
        drawn = rng.sample(rows, settings.batch_size)
        messages = [row["prompt"][0]["content"] for row in drawn]
        batches.append([(message, solution(message, n < num_direct)) for n, message in enumerate(messages)])
    return batches


def collate(tokenizer: PreTrainedTokenizerBase, batch: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """A padded batch, (rows, longest); the labels are the answers' tokens, the end of the message included."""

    def text(message: str) -> str:
        chat = [{"role": "user", "content": message}]
        return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))

    prompts = [tokenizer.encode(text(message), add_special_tokens=False) for message, _ in batch]
    answers = [
        [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.convert_tokens_to_ids("<|im_end|>")]
        for _, answer in batch
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    shape = (len(batch), longest)
    input_ids, attention_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED_LABEL)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor([*prompt, *answer])
        attention_mask[row, :end] = 1
        labels[row, len(prompt) : end] = input_ids[row, len(prompt) : end]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def loss_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss of the answers' tokens, in nats. The LM head, a fifth of the model, sees these positions alone."""
    hidden = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    learnt = labels != IGNORED_LABEL
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[learnt]), labels[learnt])


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    settings: Settings,
    console: Console,
) -> tuple[float, int]:
    """Teach both ways to answer. Returns the mean loss of the last tenth of the steps, and the number of tokens."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, settings.steps // 20), settings.steps)
    losses, num_tokens = [], 0
    model.train()
    with task("warm-up", settings.steps, console=console) as shown:
        for pairs in demonstrations(rows, settings):
            batch = collate(tokenizer, pairs)
            loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            num_tokens += int(batch["attention_mask"].sum())
            shown.advance(note=f"loss {losses[-1]:.3f}")
    model.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail), num_tokens


def build(output: Path, base: Path, settings: Settings, console: Console, *, overwrite: bool = False) -> Report | None:
    """Build the world at `output`, or return None if it stands there; fetch the model if `base` is missing.

    Raises:
        BuildMismatchError: the output is something other than the build with these settings.
        EntropyForkError: the model cannot be fetched, or reasoning-gym is not installed.
    """

    def write(folder: Path) -> Report:
        with task("the world of SmolLM2's run", console=console):
            if not base.exists():
                fetch(MODEL, base)
            return build_into(folder, base, settings, console)

    return build_once(output, settings.checksum, write, overwrite=overwrite)


def build_into(folder: Path, base: Path, settings: Settings, console: Console) -> Report:
    """Do the work of `build` in a temporary folder; the manifest is written last."""
    set_seed(settings.seed)
    rows = write_problems(folder, settings, console)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    began = time.monotonic()
    loss, num_tokens = warm_up(model, tokenizer, rows, settings, console)
    report = Report(model.num_parameters(), time.monotonic() - began, num_tokens, loss)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if (base / "LICENSE").exists():
        shutil.copyfile(base / "LICENSE", folder / "model" / "LICENSE")
    card = _CARD.format(steps=settings.steps, demonstrations=settings.steps * settings.batch_size)
    (folder / "model" / "README.md").write_text(card)
    manifest = {"checksum": settings.checksum, "settings": asdict(settings), "report": asdict(report)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return report


def summary(report: Report) -> Table:
    table = Table("measure", "value", title="Build of the world of SmolLM2's run")
    table.add_row("parameters", f"{report.parameters:,}")
    table.add_row("warm-up seconds", f"{report.warmup_seconds:.0f}")
    table.add_row("warm-up tokens", f"{report.warmup_tokens:,}")
    table.add_row("warm-up loss (nats)", f"{report.warmup_loss:.3f}")
    return table


def main(
    output: Annotated[Path, typer.Option(help="Directory to create, with model/, train.parquet and test.parquet.")],
    base: Annotated[
        Path | None,
        typer.Option(help="The fetched model. If it is missing, it is fetched. Default: beside the output."),
    ] = None,
    seed: int = Settings.seed,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the supervised warm-up.")] = Settings.steps,
    batch_size: Annotated[int, typer.Option(min=1)] = Settings.batch_size,
    learning_rate: float = Settings.learning_rate,
    direct_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of demonstrations that give the answer at once.")
    ] = Settings.direct_rate,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default, one per core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace whatever stands at the output.")] = False,
) -> None:
    """Warm SmolLM2 up on sums, and write the questions of its run."""
    console = Console()
    transformers_logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        share_cores()
    settings = replace(
        Settings(),
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        direct_rate=direct_rate,
    )
    try:
        report = build(output, base or output.parent / "model", settings, console, overwrite=overwrite)
    except BuildMismatchError as error:
        raise typer.BadParameter(f"{error}; choose another --output or pass --overwrite") from error
    except EntropyForkError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if report is None:
        console.print(f"{output} is already built with these settings.")
    else:
        console.print(summary(report))


if __name__ == "__main__":
    typer.run(main)
