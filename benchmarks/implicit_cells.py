"""The lines of ``implicit.jsonl`` by what they share, and cells of tables: means, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import differences
from differences import Difference

Record = Mapping[str, Any]
Row = dict[int, Record]
"""One line by seed."""
USUAL = {
    "part": "scan",
    "step": 20.0,
    "weight": 0.0,
    "epsilon": 0.2,
    "term": "implicit",
    "anchor": "gradient-step",
    "activation": "relu",
    "lr": 0.1,
}
"""The run that the others are described beside: the published setting without the term."""


class Lines:
    """The lines, for :meth:`row` to choose from."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = [record for record in records if "failed" not in record]
        self.failed = [record for record in records if "failed" in record]

    def row(self, **settings: Any) -> Row:
        """The lines with these settings, by seed; what is not said is as :data:`USUAL` has it."""
        wanted = USUAL | settings
        return {
            record["settings"]["seed"]: record
            for record in self.records
            if all(record["settings"][name] == value for name, value in wanted.items())
        }

    def values(self, name: str, **settings: Any) -> list[Any]:
        """The values of a setting among the lines with these others."""
        chosen = [r["settings"] for r in self.records if all(r["settings"][k] == v for k, v in settings.items())]
        return sorted({of[name] for of in chosen})


def accuracy(name: str) -> Callable[[Record], float]:
    """In %."""
    return lambda record: 100 * record["results"][name]["accuracy"]


def last(name: str) -> Callable[[Record], float]:
    """Of the last look."""
    return lambda record: record["looks"][-1][name]


def unbiased(share: float, count: int = 8) -> float:
    """‖E g‖²/E ‖g‖² from ‖mean‖²/mean ‖·‖² of ``count`` draws: of noise the latter is 1/count on average, not 0."""
    return (count * share - 1) / (count - 1)


def values(row: Row, of: Callable[[Record], float]) -> list[float]:
    return [of(record) for _, record in sorted(row.items())]


def mean(row: Row, of: Callable[[Record], float], digits: int = 2) -> str:
    """The mean over those that have a value; – where there is no line, or an attack was not made of all."""
    try:
        every = [value for value in values(row, of) if value is not None]
    except KeyError:
        return "–"
    return f"{statistics.mean(every):.{digits}f}".replace("-", "−") if every else "–"


def spread(row: Row, of: Callable[[Record], float], digits: int = 1) -> str:
    """Mean ± standard deviation over the seeds."""
    middle = mean(row, of, digits)
    return middle if middle == "–" or len(row) < 2 else f"{middle} ± {statistics.stdev(values(row, of)):.{digits}f}"


def paired(row: Row, beside: Row, of: Callable[[Record], float]) -> Difference | None:
    """The difference over the common seeds; None below two of them, or where an attack was not made of all."""
    try:
        seeds = row.keys() & beside.keys()
        gap = differences.paired(*({seed: of(rows[seed]) for seed in seeds} for rows in (row, beside)))
    except KeyError:
        return None
    return gap if gap is not None and gap.n > 1 else None


def difference(row: Row, beside: Row, of: Callable[[Record], float], digits: int = 1) -> str:
    """The paired difference ± its standard error; * beyond Student's 95 % interval."""
    return _with_error(paired(row, beside, of), digits)


def own(row: Row, of: Callable[[Record], float], digits: int = 3) -> str:
    """The mean ± its standard error; * where Student's 95 % interval leaves out 0."""
    gap = differences.paired({seed: of(record) for seed, record in row.items()}, dict.fromkeys(row, 0.0))
    return _with_error(gap if gap is not None and gap.n > 1 else None, digits)


def _with_error(gap: Difference | None, digits: int) -> str:
    if gap is None:
        return "–"
    star = "\\*" if gap.clear else ""
    return f"{gap.mean:+.{digits}f} ± {gap.error:.{digits}f}{star}".replace("-", "−")


def geometric(numbers: Sequence[float | None], least: float) -> str:
    """The geometric mean; what is below the least step counts as half a decade less."""
    known = [least / math.sqrt(10) if number is None else number for number in numbers]
    return f"{math.exp(statistics.mean(map(math.log, known))):.1e}" if known else "–"
