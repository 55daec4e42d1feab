"""Scores one answer per data file with a reward function of the user's, in a process of its own.

Runs as ``python -m entropy_fork.verl.early.one_answer``: reads a request as JSON from standard input and writes what
came of it as JSON to the file that the request names. The code is the user's, and does here what it does in verl's
reward workers. It imports nothing of verl.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

#: what verl gives to a reward function (verl/experimental/reward_loop/reward_manager/naive.py)
GIVEN = ("data_source", "solution_str", "ground_truth", "extra_info")


def load(path: str, name: str) -> Callable[..., Any]:
    """The function, as verl's ``load_extern_object`` finds it."""
    if path.startswith("pkg://"):
        module = importlib.import_module(path.removeprefix("pkg://").replace("/", "."))
    else:
        spec = importlib.util.spec_from_file_location("custom_module", path.removeprefix("file://"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def surplus_arguments(function: Callable[..., Any], names: list[str]) -> tuple[list[str], list[str]]:
    """The names that a function does not take, and those that it takes. Both are empty where it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return [], []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return [], []
    takes = [each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return [name for name in names if name not in takes], takes


def missing_arguments(function: Callable[..., Any], names: list[str]) -> list[str]:
    """The arguments that a function needs and that are not among the names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty and p.name not in names]


def wrong_result(result: Any, metric: str | None) -> str | None:
    """What verl could not use of a reward function's result; None where it can use it.

    Args:
        result: what the function returned.
        metric: what dynamic sampling compares in a group; None without dynamic sampling.
    """
    keys = ["acc"]
    score = result
    if isinstance(result, dict):
        if "score" not in result:
            return f"returned a dict without the key 'score': it has {', '.join(map(str, result))}"
        score, keys = result["score"], [str(key) for key in result]
    try:
        float(score)
    except (TypeError, ValueError):
        return f"returned {str(score)[:80]!r}, which is not a number (or a dict with the number 'score')"
    if metric is not None and metric != "reward" and metric not in keys:
        return (
            f"returned {', '.join(keys)}, and dynamic sampling compares algorithm.filter_groups.metric={metric}. "
            f"Return it too, or write algorithm.filter_groups.metric=reward"
        )
    return None


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What came of a request: ``stage`` is load, arguments, score or done; ``error`` and ``takes`` say more."""
    try:
        function = load(request["path"], request["name"])
    except BaseException as error:
        return {"stage": "load", "error": _said(error)}
    given = [*GIVEN, *request["router"], *request["kwargs"]]
    surplus, takes = surplus_arguments(function, [*request["router"], *request["kwargs"]])
    if surplus:
        return {"stage": "arguments", "surplus": surplus, "takes": [name for name in takes if name not in GIVEN]}
    refused, _ = surplus_arguments(function, list(GIVEN))
    if refused or (missing := missing_arguments(function, given)):
        return {"stage": "arguments", "refused": refused, "missing": [] if refused else missing}
    for row in request["rows"]:
        try:
            result = function(**row["given"], **request["kwargs"])
            if inspect.isawaitable(result):
                result = asyncio.run(_awaited(result))
        except BaseException as error:
            elsewhere = isinstance(error, (OSError, TimeoutError)) and not isinstance(error, FileNotFoundError)
            return {"stage": "score", "file": row["file"], "error": f"raised {_said(error)}", "elsewhere": elsewhere}
        if wrong := wrong_result(result, request["metric"]):
            return {"stage": "score", "file": row["file"], "error": wrong, "elsewhere": False}
    return {"stage": "done"}


async def _awaited(result: Any) -> Any:
    return await result


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    sys.path[:] = request["sys_path"]
    result = answer(request)
    with open(request["reply"], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
