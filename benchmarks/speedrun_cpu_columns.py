"""The lines of ``speedrun_cpu.py`` by time: what is there, and what held-out images choose."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from differences import by_images

__all__ = ["BASELINES", "Column", "Record", "advancing", "columns_of"]

BASELINES = ("Fast-AT", "ATAS", "PGD-7")
"""Trained for every time."""

Record = Mapping[str, Any]


class Column:
    """The lines of one time.

    Args:
        budget: minutes of two cores.
        records: lines of this time.
        names: compositions that are to be there, in the page's order.
    """

    def __init__(self, budget: float, records: Sequence[Record], names: Sequence[str]) -> None:
        self.budget, self.names = budget, names
        self.records = records
        self.failed = [r for r in records if "failed" in r]
        self.rows = {
            name: rows
            for name in dict.fromkeys((*names, *(r["composition"] for r in records)))
            if (rows := [r for r in records if r["composition"] == name]) and not any("failed" in r for r in rows)
        }

    @property
    def lacks(self) -> str:
        """What is missing for each composition to have a line for each seed; "" for nothing."""
        there = {(r["composition"], r["seed"]) for r in self.records}
        names, seeds = ({pair[i] for pair in there} for i in (0, 1))
        if missing := set(self.names) - names:
            return f"{len(missing)} of {len(self.names)} compositions are not trained yet"
        if not there >= {(name, seed) for name in self.names for seed in seeds}:
            return f"not all rows have {len(seeds)} seeds yet"
        return ""

    def accuracy(self, name: str, attack: str) -> dict[int, float]:
        """On test images in %, by seed, of the runs that were attacked so."""
        rows = self.rows.get(name, [])
        return {r["seed"]: 100 * r["results"][attack]["accuracy"] for r in rows if attack in r["results"]}

    def held_out(self, name: str) -> dict[int, float]:
        """Of the last epoch on held-out images in %, by seed."""
        return {r["seed"]: 100 * r["epochs"]["robust"][-1] for r in self.rows.get(name, [])}

    def error(self, name: str, attack: str | None = None) -> float:
        """The standard error of a row's accuracy that comes from the number of images; ``None``: the held-out ones."""
        row = self.rows[name][0]
        accuracies = self.held_out(name) if attack is None else self.accuracy(name, attack)
        images = row["held_out"] if attack is None else row["results"][attack]["n"]
        return by_images(statistics.mean(accuracies.values()), images)

    @property
    def best(self) -> str | None:
        """What held-out images choose."""
        return max(self.rows, key=lambda name: statistics.mean(self.held_out(name).values()), default=None)

    @property
    def level(self) -> list[str]:
        """What held-out images do not tell from the best: within two standard errors of the difference."""
        best = self.best
        if best is None:
            return []
        top = statistics.mean(self.held_out(best).values())
        return [
            name
            for name in self.rows
            if name != best
            and top - statistics.mean(self.held_out(name).values()) < 2 * math.hypot(self.error(best), self.error(name))
        ]


def advancing(column: Column) -> list[str]:
    """Which compositions are trained for the next longer time: the baselines, and the better half of the others.

    Halves are by accuracy on held-out images, rounded up.
    """
    others = [name for name in column.rows if name not in BASELINES]
    others.sort(key=lambda name: -statistics.mean(column.held_out(name).values()))
    chosen = {*BASELINES, *others[: math.ceil(len(others) / 2)]}
    return [name for name in column.names if name in chosen]


def columns_of(records: Sequence[Record], names: Sequence[str]) -> list[Column]:
    """The times that have lines, from the shortest, which has all these compositions."""
    columns: list[Column] = []
    for budget in sorted({r["budget"] for r in records}):
        names = advancing(columns[-1]) if columns else names
        columns.append(Column(budget, [r for r in records if r["budget"] == budget], names))
    return columns
