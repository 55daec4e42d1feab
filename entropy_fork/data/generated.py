"""Questions that reasoning-gym generates, as verl's parquet: ``entropy-fork data prepare reasoning_gym``.

Each task draws its questions from a seed, as many as are asked for. Training and held-out questions come from two
seeds, and no question is in both. A row is written only if the reward gives 1 for its right answer and less for
nonsense.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

import entropy_fork
from entropy_fork.common.close_names import did_you_mean
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.installing import why_missing
from entropy_fork.common.progress import task as shown_task
from entropy_fork.data.prepare import MANIFEST, REJECTED, SCHEMA, check_free, normalised, put_in_place
from entropy_fork.data.read import sha256
from entropy_fork.data.sources import TEST, TRAIN
from entropy_fork.data.template import INSTRUCTION, OTHER_FORM, asks_for_a_box, user_message
from entropy_fork.reward import compute_score
from entropy_fork.reward.reasoning_gym import EXTRA, PREFIX, ground_truth_of

#: the name of this source on the command line
NAME = "reasoning_gym"

#: it mixes the others, and has no questions of its own
_NO_TASK = "composite"

#: Draws for each question that is asked for, and draws more. A task that then still lacks questions has no more.
_DRAWS, _MORE = 20, 200

_NONSENSE = "no answer at all"


@dataclass(frozen=True)
class Wanted:
    """What is to be generated.

    Attributes:
        tasks: names of reasoning-gym's tasks.
        size: questions for training, of each task.
        holdout: questions held out, of each task.
        seed: the same seed gives the same questions.
        options: by task, its difficulty: names and values of its config.
        template: the instruction behind each question, or a text with ``{question}`` in it.
        name: of the folder.
    """

    tasks: tuple[str, ...]
    size: int
    holdout: int = 0
    seed: int = 0
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    template: str = INSTRUCTION
    name: str = NAME


@dataclass
class _Drawn:
    """The questions of a task, and what was left out of them."""

    rows: dict[str, list[dict[str, Any]]]
    rejected: list[dict[str, Any]]
    dropped: Counter[str]
    drawn: int = 0


def known_tasks() -> dict[str, tuple[Any, Any]]:
    """Every task by its name, with its dataset and its config.

    Raises:
        EntropyForkError: reasoning-gym is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise EntropyForkError(why_missing(["reasoning_gym"], EXTRA))
    import reasoning_gym  # noqa: F401
    from reasoning_gym.factory import DATASETS

    return {name: DATASETS[name] for name in sorted(DATASETS) if name != _NO_TASK}


def options_of(task: str) -> dict[str, Any]:
    """The options of a task that set its difficulty, with their defaults.

    Raises:
        EntropyForkError: there is no such task.
    """
    config = _known(task)[1]()
    return {
        each.name: getattr(config, each.name)
        for each in dataclasses.fields(config)
        if each.name not in ("seed", "size")
    }


def example_of(task: str, seed: int = 0) -> dict[str, Any]:
    """One question of a task, with its answer.

    Raises:
        EntropyForkError: there is no such task.
    """
    entry: dict[str, Any] = _dataset(task, {}, seed, 1)[0]
    return entry


def read_options(texts: Sequence[str], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options from the command line, ``TASK.OPTION=VALUE`` each, by their task.

    Raises:
        EntropyForkError: one has another form, names a task that is not asked for, or an option that it has not.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        place, equals, value = text.partition("=")
        task, dot, option = place.partition(".")
        if not (equals and dot and option):
            raise EntropyForkError(f"--set {text}: write TASK.OPTION=VALUE, such as chain_sum.max_digits=1")
        if task not in tasks:
            raise EntropyForkError(f"--set {text}: there is no --task {task}.{did_you_mean(task, tasks)}")
        known = options_of(task)
        if option not in known:
            raise EntropyForkError(
                f"--set {text}: {task} has no option {option}.{did_you_mean(option, known)} It has {', '.join(known)}"
            )
        found.setdefault(task, {})[option] = _value(value)
    return found


def _value(text: str) -> Any:
    """A value in JSON; other text means itself. ``True`` and ``None`` are taken as Python writes them."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def _known(task: str) -> tuple[Any, Any]:
    tasks = known_tasks()
    if task not in tasks:
        raise EntropyForkError(
            f"reasoning-gym has no task {task!r}.{did_you_mean(task, tasks)} 'entropy-fork data tasks' lists all "
            f"{len(tasks)}"
        )
    return tasks[task]


def _dataset(task: str, options: dict[str, Any], seed: int, size: int) -> Any:
    dataset, config = _known(task)
    try:
        return dataset(config=config(**options, seed=seed, size=size))
    except (AssertionError, TypeError, ValueError, KeyError, AttributeError) as error:
        given = " ".join(f"{task}.{name}={value}" for name, value in options.items())
        raise EntropyForkError(f"{task} cannot be made with {given or 'its defaults'}: {error}") from None


def prepare_generated(wanted: Wanted, output: Path, console: Console, overwrite: bool = False) -> dict[str, Any]:
    """Write the folder ``output/NAME``: ``train.parquet``, ``test.parquet``, manifest and rejected rows.

    The folder appears at once, with a rename, when everything in it is complete.

    Args:
        wanted: the tasks, and how many questions of each.
        output: the folder in which the folder is made.
        console: where progress is shown.
        overwrite: replace what an earlier call wrote there.

    Returns:
        The manifest.

    Raises:
        EntropyForkError: the folder exists already; a task is unknown, cannot be made with its options, has too few
            different questions, or none that the reward can score.
    """
    folder = output.absolute() / wanted.name
    check_free(folder, overwrite)
    for task in wanted.tasks:
        _dataset(task, wanted.options.get(task, {}), 0, 1)
    seen: set[str] = set()
    found = {task: _draw(task, wanted, seen, console) for task in wanted.tasks}
    folder.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{wanted.name}.new.", dir=folder.parent))
    try:
        manifest = _write(wanted, found, workspace)
        workspace.chmod(0o755)
        put_in_place(workspace, folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return manifest


def _draw(task: str, wanted: Wanted, seen: set[str], console: Console) -> _Drawn:
    """Draw the questions of a task. ``seen`` holds the questions of all tasks and both splits so far."""
    options = wanted.options.get(task, {})
    found = _Drawn({TRAIN: [], TEST: []}, [], Counter())
    for use, count in ((TRAIN, wanted.size), (TEST, wanted.holdout)):
        rows = found.rows[use]
        draws = _DRAWS * count + _MORE
        dataset = _dataset(task, options, seed_of(wanted.seed, task, use), draws)
        with shown_task(f"{task}: {use}", count, console=console) as shown:
            for number in range(draws if count else 0):
                if len(rows) == count:
                    break
                found.drawn += 1
                try:
                    entry = dataset[number]
                except Exception:  # a generator may find no question with these options
                    found.dropped["not_generated"] += 1
                    continue
                same = normalised(entry["question"])
                if same in seen:
                    found.dropped["duplicate"] += 1
                    continue
                seen.add(same)
                identifier = f"{task} {use} {number}"
                truth = ground_truth_of(dataset, entry, options)
                if reason := _unusable(task, entry, truth, wanted.template):
                    found.dropped[reason] += 1
                    answer = str(entry["answer"])
                    found.rejected.append(
                        {"reason": reason, "id": identifier, "question": entry["question"], "answer": answer}
                    )
                    if not rows and len(found.rejected) >= _MORE:
                        break  # none of them will do
                    continue
                rows.append(_row(task, dataset.category, use, len(rows), identifier, entry["question"], truth, wanted))
                shown.advance()
        if len(rows) < count:
            raise EntropyForkError(_too_few(task, found, wanted))
    return found


def seed_of(seed: int, task: str, use: str) -> int:
    """The seed of a task's questions for training or evaluation.

    reasoning-gym makes question n from the seed plus n. So seeds that lie side by side give the same questions, and the
    two seeds of a task are far apart.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {task} {use}".encode()).digest()[:4], "big") >> 1


def _unusable(task: str, entry: dict[str, Any], truth: str | None, template: str) -> str | None:
    """The reason why a question cannot be used; None if it can be."""
    if entry["answer"] is None:
        return "no_answer"
    if asks_for_a_box(template) and OTHER_FORM.search(entry["question"]):
        return "other_instruction"
    if truth is None or _score(task, entry["answer"], truth) < 1.0:
        return "answer_not_scorable"
    return "any_answer_is_right" if _score(task, _NONSENSE, truth) >= 1.0 else None


def _score(task: str, answer: str, truth: str) -> float:
    return compute_score(PREFIX + task, f"\\boxed{{{answer}}}", truth)["acc"]


def _too_few(task: str, found: _Drawn, wanted: Wanted) -> str:
    rows = sum(map(len, found.rows.values()))
    dropped = ", ".join(f"{count} {reason}" for reason, count in found.dropped.most_common())
    if not rows:
        return f"none of {found.drawn} questions of {task} can be used: {dropped}. Leave the task out"
    return (
        f"{task} has too few different questions: {found.drawn} draws brought {rows} of the "
        f"{wanted.size + wanted.holdout} that are asked for ({dropped}). Write a smaller --size or --holdout, or more "
        f"difficult options ('entropy-fork data tasks {task}' lists them)"
    )


def _row(
    task: str, ability: str, use: str, index: int, identifier: str, question: str, truth: str | None, wanted: Wanted
) -> dict[str, Any]:
    return {
        "data_source": PREFIX + task,
        "prompt": [user_message(question.strip(), wanted.template)],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": index, "split": use, "id": identifier},
    }


def _write(wanted: Wanted, found: dict[str, _Drawn], folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for use in (TRAIN, TEST):
        rows = [row for task in found.values() for row in task.rows[use]]
        for index, row in enumerate(rows):
            row["extra_info"]["index"] = index
        if rows:
            file = folder / f"{use}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, write_page_checksum=True)
            files[use] = {"rows": len(rows), "file": file.name, "sha256": sha256(file)}
    with (folder / REJECTED).open("w", encoding="utf-8") as stream:
        for task in found.values():
            for line in task.rejected:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    manifest = {
        "source": NAME,
        "reasoning_gym": importlib.metadata.version("reasoning-gym"),
        "seed": wanted.seed,
        "instruction": wanted.template,
        "tasks": {
            task: {
                "options": wanted.options.get(task, {}),
                **{use: len(rows) for use, rows in drawn.rows.items() if rows},
                "drawn": drawn.drawn,
                "dropped": dict(sorted(drawn.dropped.items())),
            }
            for task, drawn in found.items()
        },
        "files": files,
        "entropy_fork": entropy_fork.__version__,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest
