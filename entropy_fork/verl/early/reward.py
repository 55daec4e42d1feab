"""The reward: who gives one to each data source, whether the function runs, and what the prompt asks for.

verl loads the reward function in its reward workers, after the model is loaded, and a function that raises there ends
the run with an error of the replay buffer. So one made-up answer, the right one to the first row, is scored here. Our
own function is called in this process; one of the user's in a process of its own, for at most :data:`SECONDS`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from entropy_fork.common.close_names import did_you_mean
from entropy_fork.common.problem import Problem
from entropy_fork.verl.early import one_answer
from entropy_fork.verl.early.files import has_code
from entropy_fork.verl.early.rows import Rows, read_rows
from entropy_fork.verl.guards.data_files import OUR_REWARD, reads_with_verl

FUNCTION = "reward.custom_reward_function"

#: how long a reward function of the user's may take to be loaded and to score the answers
SECONDS = 60.0

#: when a reward function is first called
AT_FIRST_ANSWER = "when the first answers are scored"

#: reward managers that call verl's own function where the run names none
WITH_DEFAULT = ("naive", "dapo", "gdpo")


@dataclass(frozen=True)
class Form:
    """A form in which a prompt asks for the final answer.

    Attributes:
        name: as the message shows it.
        asked: finds the instruction in a prompt.
    """

    name: str
    asked: re.Pattern[str]


BOXED = Form(r"\boxed{…}", re.compile(r"boxed"))
ANSWER = Form("'Answer: …'", re.compile(r"answer:\s*\\?\$answer|(the form|after)\s+[\"'“]?answer:", re.IGNORECASE))
HASHES = Form("'#### …'", re.compile(r"####"))
TAGS = Form("<answer>…</answer>", re.compile(r"<answer>"))
FORMS = (BOXED, ANSWER, HASHES, TAGS)

#: the one form that verl's own reward reads, by data source; of the others more than one, or none of these
READS = {
    "openai/gsm8k": HASHES,
    "lighteval/MATH": BOXED,
    "DigitalLearningGmbH/MATH-lighteval": BOXED,
    "HuggingFaceH4/MATH-500": BOXED,
}


def check_reward(config: DictConfig) -> Iterator[Problem]:
    """Somebody gives a reward to every row, can be called as the run says, and reads what the prompt asks for."""
    if _select(config, "custom_reward_function.path") and not _reads_old_keys():
        yield Problem(
            f"custom_reward_function.path is an old key that main_ppo does not read. Write {FUNCTION}.path="
            f"{_select(config, 'custom_reward_function.path')}.",
            AT_FIRST_ANSWER,
        )
    path, name = _select(config, f"{FUNCTION}.path"), _select(config, f"{FUNCTION}.name")
    rows = read_rows(config) if reads_with_verl(config) else []
    if not path:
        if _select(config, "custom_reward_function.path") or _select(config, "reward.reward_model.enable"):
            return
        if _select(config, "reward.reward_manager.source") == "register" and (
            _select(config, "reward.reward_manager.name") in WITH_DEFAULT
        ):
            yield from _check_verls(config, rows)
    elif not has_code(config, f"{FUNCTION}.path", f"{FUNCTION}.name"):
        return  # check_code says so
    elif path == OUR_REWARD and name == "compute_score":
        yield from _check_ours(config, rows)
        yield from _check_form(config, rows, lambda _: BOXED)
    else:
        yield from _check_users(config, str(path), str(name), rows)


def _reads_old_keys() -> bool:
    """Whether this verl's main_ppo moves ``custom_reward_function`` to its new place. verl 0.9.1 does not."""
    spec = importlib.util.find_spec("verl.trainer.main_ppo")
    return spec is None or "migrate_legacy_reward" in Path(spec.origin or "").read_text(encoding="utf-8")


def _check_verls(config: DictConfig, rows: list[Rows]) -> Iterator[Problem]:
    """verl/utils/reward_score/__init__.py: default_compute_score."""
    from verl.utils.reward_score import default_compute_score

    knows = known_sources(default_compute_score)
    for each in {each.path: each for each in reversed(rows)}.values():
        if knows is None:
            break
        unknown = [source for source in each.sources if not knows(source)]
        if unknown:
            yield Problem(
                f"data.{each.key}: {each.path} has rows of the data source{'s'[: len(unknown) > 1]} "
                f"{', '.join(map(repr, unknown[:5]))}, for which verl has no reward, and the run names no reward "
                f"function. Write {FUNCTION}.path={OUR_REWARD} {FUNCTION}.name=compute_score (it reads the last "
                f"\\boxed{{}}), or a file with a function of yours.",
                AT_FIRST_ANSWER,
            )
    yield from _check_form(config, rows, lambda each: READS.get(each.sources[0]) if len(each.sources) == 1 else None)


def known_sources(function: Callable[..., Any]) -> Callable[[str], bool] | None:
    """Which data sources verl's own reward function knows, read from its source.

    Args:
        function: ``default_compute_score``.

    Returns:
        Whether it knows one; None where its source is not a chain of comparisons of ``data_source``.
    """
    names: set[str] = set()
    beginnings: list[str] = []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "data_source":
            names |= set(_texts(node.comparators[0]))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "data_source.startswith":
            beginnings += _texts(node.args[0])
    if "openai/gsm8k" not in names:
        return None
    return lambda source: source in names or source.startswith(tuple(beginnings))


def _texts(node: ast.AST) -> list[str]:
    """The texts in an expression."""
    constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return [value for value in constants if isinstance(value, str)]


def _check_form(config: DictConfig, rows: list[Rows], reads: Callable[[Rows], Form | None]) -> Iterator[Problem]:
    """The prompt of the first row does not ask for a form that the reward never looks at."""
    template = str(_select(config, "actor_rollout_ref.model.custom_chat_template") or "")
    prompt = str(_select(config, "data.prompt_key") or "prompt")
    for each in rows:
        wanted = reads(each)
        text = template + _text_of(each.first.get(prompt)) if each.first else ""
        if wanted is None or wanted.asked.search(text):
            continue
        asked = next((form for form in FORMS if form.asked.search(text)), None)
        if asked is None:
            continue
        endless = (
            ", and dynamic sampling would look for a right one without end"
            if _select(config, "algorithm.filter_groups.enable") and each.key == "train_files"
            else ""
        )
        yield Problem(
            f"data.{each.key}: the prompts of {each.path} ask for the answer as {asked.name}, and the reward reads "
            f"{wanted.name}: every answer would be wrong{endless}. 'entropy-fork data prepare' writes prompts that ask "
            f"for \\boxed{{}}; or name a reward function that reads {asked.name} in {FUNCTION}.path.",
            "never: every reward is 0",
            fatal=each.key == "train_files",
        )


def _text_of(messages: Any) -> str:
    """All text of a prompt."""
    if isinstance(messages, str):
        return messages
    contents = [message.get("content") for message in messages or [] if isinstance(message, dict)]
    return "\n".join(content if isinstance(content, str) else json.dumps(content, default=str) for content in contents)


def _check_ours(config: DictConfig, rows: list[Rows]) -> Iterator[Problem]:
    from entropy_fork.reward import compute_score

    kwargs = _kwargs(config)
    surplus, takes = one_answer.surplus_arguments(compute_score, list(kwargs))
    for name in surplus:
        yield _surplus(name, [each for each in takes if each not in (*one_answer.GIVEN, *_ROUTER)])
    if surplus:
        return
    made_up: list[Rows | None] = [*rows] or [None]
    for each in made_up:
        truth = _truth(each.first) if each is not None and each.first else "1"
        source = each.first.get("data_source", "") if each is not None and each.first else ""
        truth = truth[:1] if isinstance(truth, list) else truth
        right = str(truth[0] if isinstance(truth, list) and truth else truth)
        try:
            result = compute_score(str(source), f"\\boxed{{{right}}}", truth, **kwargs)
            wrong = one_answer.wrong_result(result, _metric(config))
        except Exception as error:
            wrong = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            limit = str(error).startswith("reward.") or not isinstance(error, ValueError)
            if each is not None and not limit:
                wrong = f"data.{each.key}: {each.path}, the first row: {wrong}"
            elif not str(error).startswith("reward."):
                wrong = f"{FUNCTION}.reward_kwargs={kwargs}: {wrong}"
        if wrong:
            yield Problem(wrong, AT_FIRST_ANSWER)
            return


_ROUTER = ("reward_router_address", "reward_model_tokenizer")


def _check_users(config: DictConfig, path: str, name: str, rows: list[Rows]) -> Iterator[Problem]:
    """In a process of its own: the function is loaded, takes the arguments, and scores the first rows."""
    kwargs = _kwargs(config)
    with_model = bool(_select(config, "reward.reward_model.enable"))
    request = {
        "path": path if path.startswith("pkg://") else os.path.abspath(path.removeprefix("file://")),
        "name": name,
        "kwargs": kwargs,
        "router": list(_ROUTER) if with_model else [],
        "metric": _metric(config),
        "rows": [] if with_model else [row for each in rows if each.first for row in [_row(each)] if row],
    }
    where = f"the reward function {name} of {path}"
    answer = _ask(request)
    if answer is None:
        yield Problem(f"{where} had not scored one answer after {SECONDS:g} s, so it was not checked.", fatal=False)
        return
    match answer["stage"]:
        case "load":
            yield Problem(f"{FUNCTION}.path={path} cannot be loaded: {answer['error']}.", AT_FIRST_ANSWER)
        case "arguments" if answer.get("surplus"):
            for each in answer["surplus"]:
                yield _surplus(each, answer["takes"])
        case "arguments" if answer["refused"]:
            yield Problem(
                f"{where} does not take {', '.join(answer['refused'])}, which verl gives to it: its arguments must be "
                f"{', '.join(one_answer.GIVEN)}.",
                AT_FIRST_ANSWER,
            )
        case "arguments":
            yield Problem(
                f"{where} needs {', '.join(answer['missing'])}, which nobody gives. Write "
                f"+{FUNCTION}.reward_kwargs.{answer['missing'][0]}=VALUE.",
                AT_FIRST_ANSWER,
            )
        case "score":
            yield Problem(
                f"{where}, asked for the score of one made-up answer to the first row of {answer['file']}, "
                f"{answer['error']}.",
                AT_FIRST_ANSWER,
                fatal=not answer["elsewhere"],
            )
        case "ended":
            yield Problem(f"{where} ended its process: {answer['error']}", AT_FIRST_ANSWER)


def _surplus(name: str, takes: list[str]) -> Problem:
    if name in one_answer.GIVEN:
        return Problem(f"{FUNCTION}.reward_kwargs.{name}: verl gives this argument. Leave it out.", AT_FIRST_ANSWER)
    return Problem(
        f"{FUNCTION}.reward_kwargs.{name}: the reward function takes no such argument.{did_you_mean(name, takes)} It "
        f"takes {', '.join(takes) or 'none'}.",
        AT_FIRST_ANSWER,
    )


def _row(rows: Rows) -> dict[str, Any] | None:
    """A request for the right answer to the first row; None for a row whose columns verl would refuse."""
    first = rows.first or {}
    truth = _truth(first)
    if "data_source" not in first or truth is None:
        return None
    right = truth[0] if isinstance(truth, list) and truth else truth
    given = {
        "data_source": first["data_source"],
        "solution_str": f"The answer is \\boxed{{{right}}}.\nAnswer: {right}\n#### {right}",
        "ground_truth": truth,
        "extra_info": {**(first.get("extra_info") or {}), "num_turns": None, "rollout_reward_scores": {}},
    }
    try:
        json.dumps(given)
    except (TypeError, ValueError):  # bytes, dates: they cannot be handed to the other process
        return None
    return {"file": rows.path, "given": given}


def _truth(row: dict[str, Any]) -> Any:
    reward = row.get("reward_model")
    return reward.get("ground_truth") if isinstance(reward, dict) else None


def _metric(config: DictConfig) -> str | None:
    groups = "algorithm.filter_groups"
    metric = _select(config, f"{groups}.metric")
    return str(metric) if _select(config, f"{groups}.enable") and metric else None


def _kwargs(config: DictConfig) -> dict[str, Any]:
    given = _select(config, f"{FUNCTION}.reward_kwargs")
    if not isinstance(given, DictConfig):
        return {}
    kwargs = OmegaConf.to_container(given, resolve=True)
    assert isinstance(kwargs, dict)
    return {str(name): value for name, value in kwargs.items()}


def _select(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key, default=None)


def _ask(request: dict[str, Any]) -> dict[str, Any] | None:
    """What the process found; None where it took too long."""
    with tempfile.TemporaryDirectory(prefix="ef-") as folder:
        reply = Path(folder) / "reply.json"
        said = Path(folder) / "said"
        command = [sys.executable, "-m", "entropy_fork.verl.early.one_answer"]
        paths = [path or os.getcwd() for path in sys.path]
        with open(said, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps({**request, "sys_path": paths, "reply": str(reply)}).encode(), SECONDS)
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end(process)
        if reply.exists():
            answer: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
            return answer
        last = said.read_text(errors="replace").strip().splitlines()
        return {
            "stage": "ended",
            "error": f"exit status {process.returncode}; it said last: {last[-1][:300] if last else 'nothing'}",
        }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started."""
    import signal
    from contextlib import suppress

    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
