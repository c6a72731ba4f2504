"""Numbers as a reader wants them: accuracies in %, radii as the field writes them, a mean with its spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..evaluate.radius import in_255ths
from ..evaluate.radius import radius_text as radius
from ..runs.record import number

__all__ = ["Spread", "gap", "in_255ths", "number", "percent", "points", "radius", "seconds", "span"]


@dataclass(frozen=True)
class Spread:
    """Values of one quantity, one for each seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The sample standard deviation (n − 1 in the denominator); None of a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        """In %, to a tenth: ``43.1 ± 1.7``; a single value has no ±."""
        return percent(self.mean) + ("" if self.std is None else f" ± {percent(self.std)}")


def percent(share: float) -> str:
    """``0.4306`` as ``43.1``."""
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A difference of two accuracies, in points, with its sign: ``+1.2``, ``−0.3``, ``0.0``."""
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def gap(spread: Spread) -> str:
    """Differences over seeds: ``+1.2 ± 0.4``."""
    return points(spread.mean) + ("" if spread.std is None else f" ± {percent(spread.std)}")


def seconds(time: float) -> str:
    """Three digits: ``0.0312 s``, ``12.4 s``, ``125 s``, ``41.2 min``."""
    if time >= 600:
        return f"{time / 60:.1f} min"
    if time >= 100:
        return f"{time:.0f} s"
    return f"{time:#.3g} s" if time > 0 else "0 s"


def span(values: Iterable[Any]) -> str:
    """``6``, or ``5–6``."""
    low, *more = sorted(set(values)) or [""]
    return f"{low}–{more[-1]}" if more else f"{low}"
