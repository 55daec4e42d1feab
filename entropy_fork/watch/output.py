"""What a line of a run's output says: a step's metrics, a line of ours, a warning, an error.

verl prints a step by its logger ``console`` (``verl/utils/logger/aggregate_logger.py: concat_dict_to_str``) in the task
runner, whose output Ray brings to the launcher with the process's name before each line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PROCESS = re.compile(r"^\((?P<name>[^()]+?) pid=(?P<pid>\d+)(?:, ip=(?P<ip>[^)]+))?\) ?")
_REPEATED = re.compile(r" \[repeated \d+x across cluster\].*$")
_STEP = re.compile(r"step:(\d+) - (.*)")
_METRIC = re.compile(r"(\S+?):(?:np\.\w+\()?(-?(?:[\d.]+(?:e[-+]?\d+)?|inf)|nan)\)?(?: - |\s*$)")
_OURS = re.compile(r"(?:entropy_fork: |(?=EntropyForkError: ))(.*)")
_DATE = r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?"
#: ``WARNING:DATE:text``, ``DATE - WARNING - logger - text``, ``DATE<tab>WARNING file.py:85 -- text``, ``Warning: text``
_WARNINGS = (
    re.compile(rf"^WARNING:(?:{_DATE}:)?(?P<text>.+)"),
    re.compile(rf"^{_DATE} - WARNING - \S+ - (?P<text>.+)"),
    re.compile(rf"^{_DATE}\s+WARNING \S+ -- (?P<text>.+)"),
    re.compile(r"^(?:\S+:\d+: )?(?:\w*Warning): (?P<text>.+)"),
)
#: the last line of a traceback: the error's name, and what it says
_ERROR = re.compile(r"^(?P<error>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit))(?:: (?P<text>.*))?$")
_TRACEBACK = "Traceback (most recent call last):"
#: errors that only hand on another process's
_HANDED_ON = ("RayTaskError", "RayActorError", "ActorDiedError", "WorkerCrashedError")


@dataclass(frozen=True)
class Step:
    """A step's metrics, by the names that verl and we give them. Step 0 is the validation before training."""

    number: int
    metrics: dict[str, float]

    @property
    def accuracy(self) -> float | None:
        """The mean over the validation's data sets, where this step was validated."""
        found = [value for name, value in self.metrics.items() if re.match(r"val-core/.*/acc/mean@\d+$", name)]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Failure:
    """An error, and whose it is.

    Attributes:
        text: the last line of its traceback.
        process: the name and number of the process; empty for the launcher.
        line: of the output, counted from 1.
    """

    text: str
    process: str
    line: int


def text_and_process(line: str) -> tuple[str, str]:
    """A line without colours and without what Ray puts before it; and the process that Ray names, or nothing."""
    text = _REPEATED.sub("", _COLOURS.sub("", line.rstrip()))
    process = _PROCESS.match(text)
    if process is None:
        return text, ""
    where = f" on {process['ip']}" if process["ip"] else ""
    return text[process.end() :], f"{process['name']} pid {process['pid']}{where}"


@dataclass
class Reader:
    """Goes through a run's output, line by line, and remembers where it is.

    Attributes:
        steps: so far, by number. Of a run that went on from a checkpoint the later ones count.
        first_failure: the first error whose traceback was printed. What follows is often a consequence of it.
    """

    steps: dict[int, Step] = field(default_factory=dict)
    first_failure: Failure | None = None
    lines: int = 0
    _warned: set[str] = field(default_factory=set)
    _in_traceback: set[str] = field(default_factory=set)

    def read(self, line: str) -> Step | str | None:
        """What is new in a line, for a reader of the run.

        Returns:
            A step; a line of ours, or a warning that was not there before; None for everything else.
        """
        self.lines += 1
        text, who = text_and_process(line)
        if (found := _STEP.match(text)) and (metrics := _METRIC.findall(found[2])):
            return self._step(int(found[1]), metrics)
        if found := _OURS.match(text):
            return found[1]
        self._look_for_failure(text, who)
        for pattern in _WARNINGS:
            if warning := pattern.match(text):
                return self._warning(warning["text"])
        return None

    def _step(self, number: int, metrics: list[tuple[str, str]]) -> Step:
        values = {name: float(value) for name, value in metrics}
        before = self.steps.get(number)
        step = Step(number, {**(before.metrics if before else {}), **values})
        self.steps[number] = step
        return step

    def _warning(self, text: str) -> str | None:
        kind = re.sub(r"\d+", "0", text)
        if kind in self._warned:
            return None
        self._warned.add(kind)
        return f"warning: {text}"

    def _look_for_failure(self, text: str, who: str) -> None:
        if text.endswith(_TRACEBACK):
            self._in_traceback.add(who)
        elif who in self._in_traceback and (error := _ERROR.match(text)):
            self._in_traceback.discard(who)
            if self.first_failure is None and not error["error"].split(".")[-1].startswith(_HANDED_ON):
                self.first_failure = Failure(text, who, self.lines)
