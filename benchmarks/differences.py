"""Differences between rows of runs with the same seeds, their standard errors, and what luck alone would give."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

__all__ = ["LEAST", "Difference", "best_by_luck", "better_and_worse", "by_images", "mean_and_spread", "paired"]

LEVEL = 0.95
LEAST = 3
"""Seeds, below which no difference is claimed."""


@dataclass(frozen=True)
class Difference:
    """Of two rows, over the seeds that both have.

    mean: of the differences. error: their standard deviation over √n, NaN for one seed. n: how many.
    """

    mean: float
    error: float
    n: int

    @property
    def half(self) -> float:
        """Half of the 95 % interval by Student's t; NaN for one seed."""
        return self.error * float(stats.t.ppf((1 + LEVEL) / 2, self.n - 1)) if self.n > 1 else math.nan

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero; of fewer than three seeds, or equal differences, it says nothing."""
        return self.n >= LEAST and 0 < self.half < abs(self.mean)

    def __str__(self) -> str:
        """The mean ± the standard error, in bold where it is clear."""
        if self.n < 2:
            return f"{self.mean:+.1f}"
        text = f"{self.mean:+.1f} ± {self.error:.1f}"
        return f"**{text}**" if self.clear else text


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """a − b over the seeds that both have; None where there is none."""
    gaps = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if not gaps:
        return None
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return Difference(statistics.mean(gaps), error, len(gaps))


def better_and_worse(gaps: Sequence[Difference]) -> tuple[int, int]:
    """How many are clearly above zero, and how many clearly below it."""
    return sum(gap.clear and gap.mean > 0 for gap in gaps), sum(gap.clear and gap.mean < 0 for gap in gaps)


def by_images(percent: float, n: int) -> float:
    """The standard error, in points, that an accuracy in % has from the number of images alone: √(p(1 − p)/n)."""
    return math.sqrt(percent * (100 - percent) / n)


def mean_and_spread(values: Mapping[int, float]) -> str:
    """Mean ± standard deviation over the seeds; a dash where there is none."""
    if not values:
        return "–"
    numbers = list(values.values())
    spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.1f}{spread}"


def best_by_luck(tried: int, error: float, quantile: float = 0.5) -> float:
    """The largest of ``tried`` differences of standard error ``error`` where all are zero in truth.

    The quantile of the largest of so many independent normal numbers: Φ⁻¹(q^(1/tried)) · error.
    """
    return error * float(stats.norm.ppf(quantile ** (1 / tried)))
