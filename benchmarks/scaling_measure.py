"""What ``scaling.py`` keeps of an axis, and how its points are timed: in turn, in one process."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bilevel_at.diagnose.counting import operations

LEAST_SECONDS = 0.01
"""What is shorter is repeated within one measurement, at most MOST_TIMES times."""
MOST_TIMES = 50

Advance = Callable[[], None]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Line:
    """One quantity at every point of an axis.

    name: what was measured.
    samples: for each point, its value in every repeat; seconds, or what ``unit`` says.
    counts: for each point, what :attr:`Axis.counted` says; None where nothing was counted.
    unit: of ``samples``.
    """

    name: str
    samples: list[list[float]]
    counts: list[float] | None = None
    unit: str = "s"

    def median(self, point: int) -> float:
        return statistics.median(self.samples[point])

    def growth(self, point: int, start: int = 0) -> float:
        """The value at a point over that at ``start``, median of the repeats' ratios."""
        return _paired(self.samples[point], self.samples[start])

    def ratio(self, other: Line, point: int) -> float:
        """This line's value over another's at the same point, median of the repeats' ratios."""
        return _paired(self.samples[point], other.samples[point])


def _paired(above: Sequence[float], below: Sequence[float]) -> float:
    if len(above) != len(below):  # one of them was measured once: a file's size
        return statistics.median(above) / statistics.median(below)
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


@dataclass(frozen=True)
class Axis:
    """An axis that was measured.

    name, title: for its files, and for the page.
    label: of its points, with their unit.
    about: what was measured, in a line or two.
    points: the sizes, rising.
    lines: what was measured at each.
    reference: the name of the line that the others are divided by, point by point; None for none.
    counted: what ``counts`` are, as ``operations``.
    clock: whose seconds they are.
    powers: whether growth is a power of the point, so that an exponent and logarithmic axes mean something.
    """

    name: str
    title: str
    label: str
    about: str
    points: list[float]
    lines: list[Line]
    reference: str | None = None
    counted: str = ""
    clock: str = "processor"
    powers: bool = True

    def line(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)

    def exponent(self, line: Line, first: int, last: int) -> float:
        """p where the line grows as point^p between two points."""
        return math.log(line.growth(last, first)) / math.log(self.points[last] / self.points[first])

    def asdict(self) -> dict[str, Any]:
        """Plain values for a file, seconds to four digits."""
        record = asdict(self)
        for line in record["lines"]:
            line["samples"] = [[float(f"{value:.4g}") for value in values] for values in line["samples"]]
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Axis:
        return cls(**{**record, "lines": [Line(**line) for line in record["lines"]]})


def in_turn(
    runs: Mapping[Hashable, Run], repeats: int, advance: Advance, clock: Callable[[], float] = time.process_time
) -> dict[Hashable, list[float]]:
    """Seconds of every run in every repeat. Two runs before: one warms up, one says how often to repeat a short one."""
    times = {}
    for key, run in runs.items():
        run()
        start = clock()
        run()
        times[key] = min(MOST_TIMES, math.ceil(LEAST_SECONDS / max(clock() - start, 1e-9)))
    seconds: dict[Hashable, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        gc.collect()
        for key, run in runs.items():
            start = clock()
            for _ in range(times[key]):
                run()
            seconds[key].append((clock() - start) / times[key])
        advance()
    return seconds


def measured(runs: Mapping[str, Sequence[Run]], repeats: int, advance: Advance, count: bool = True) -> list[Line]:
    """A line for each name, whose runs are those of the points; with their operations where these are to be counted."""
    counts = {name: [float(operations(run)) for run in each] if count else None for name, each in runs.items()}
    points = range(len(next(iter(runs.values()))))
    # Point by point, the lines of a point side by side, since it is those that are divided.
    seconds = in_turn({(name, i): runs[name][i] for i in points for name in runs}, repeats, advance)
    return [Line(name, [seconds[name, i] for i in points], counts[name]) for name in runs]
