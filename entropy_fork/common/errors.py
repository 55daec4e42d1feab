"""The one error of this package, all problems of a run at once, and the name of a process for its message."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager


class EntropyForkError(ValueError):
    """Something that was asked of Entropy Fork cannot be done; the message says what to write instead.

    Attributes:
        problems: what is wrong, a message each; one, unless the error is made of :func:`all_at_once`.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()):
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


def all_at_once(problems: Iterable[str]) -> tuple[str, list[str]]:
    """The arguments of one :class:`EntropyForkError` for all problems, each of them once.

    Args:
        problems: at least one.
    """
    each = list(dict.fromkeys(problems))
    if len(each) == 1:
        return each[0], each
    lines = [f"  {number}. {problem}" for number, problem in enumerate(each, 1)]
    return "\n".join([f"{len(each)} problems:", *lines]), each


def problems_of(checks: Iterable[Callable[[], object]]) -> list[str]:
    """What checks complain about, a message each, in their order. Empty where all pass.

    A check may stumble over a value of another type, which is another check's complaint. So an error of another class
    is raised at the end, and only if no check complains.
    """
    found: list[str] = []
    other: Exception | None = None
    for check in checks:
        try:
            check()
        except EntropyForkError as error:
            found += [problem for problem in error.problems if not is_said(problem, found)]
        except Exception as error:
            other = other or error
    if other is not None and not found:
        raise other
    return found


def is_said(message: str, known: Iterable[str]) -> bool:
    """Whether a message is among the known ones, or is about a data file that one of them names already."""
    known = list(known)
    file = re.match(r"data\.\w+: \S+", message)
    return message in known or (file is not None and any(each.startswith(file[0]) for each in known))


def process_name() -> str:
    """Host, process id and program of this process, to find it in a cluster's logs."""
    return f"{socket.gethostname()} pid {os.getpid()} ({os.path.basename(sys.argv[0]) or 'python'})"


@contextmanager
def named_process() -> Iterator[None]:
    """Add the name of this process to the message of a score or a selection that fails in a step.

    Raises:
        EntropyForkError: for a ValueError.
    """
    try:
        yield
    except EntropyForkError:
        raise
    except ValueError as error:
        raise EntropyForkError(f"{error} (in {process_name()}). The step was not trained on.") from error
