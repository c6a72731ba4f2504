"""What ``parts.py`` has measured: the lines of one setting, row by row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from differences import Difference, paired
from parts_rows import COMPOSITIONS, PARTS, Row
from parts_settings import Setting

__all__ = ["FASTBAT", "REFERENCES", "Runs", "affordable", "chosen", "machines", "text_of"]

FASTBAT, ATAS = "implicit term × 0.1 (Fast-BAT)", "remembered, adaptive"
REFERENCES = {FASTBAT: "Fast-BAT", ATAS: "ATAS", f"{ATAS}, twice the epochs": "ATAS, twice the epochs"}


class Runs:
    """The lines of one setting."""

    def __init__(self, records: Sequence[Mapping[str, Any]], setting: Setting) -> None:
        self.setting = setting
        self.records = [r for r in records if r["setting"] == setting.name]

    def of(self, row: str) -> list[Mapping[str, Any]]:
        return [r for r in self.records if r["row"] == row]

    def accuracy(self, row: str, attack: str) -> dict[int, float]:
        """In %, by seed, of the runs that were attacked so."""
        return {
            r["seed"]: 100 * r["results"][attack]["accuracy"]
            for r in self.of(row)
            if attack in r.get("results", {}) and self._whole(r, attack)
        }

    def _whole(self, record: Mapping[str, Any], attack: str) -> bool:
        """Whether it is on as many images as the setting asks for."""
        return bool(record["results"][attack]["n"] >= self.setting.attacks[attack])

    def held_out(self, row: str) -> dict[int, float]:
        """Accuracy on held-out images under the attack of training's looks, last epoch, in %, by seed."""
        return {r["seed"]: 100 * r["epochs"]["robust"][-1] for r in self.of(row) if "epochs" in r}

    def cost(self, row: str) -> float | None:
        """Counted operations of training, as a multiple of Fast-BAT's."""
        mine, fastbat = ([r["operations"] for r in self.of(name) if r.get("operations")] for name in (row, FASTBAT))
        return mine[0] / fastbat[0] if mine and fastbat else None

    def difference(self, row: str, beside: str, attack: str) -> Difference | None:
        return paired(self.accuracy(row, attack), self.accuracy(beside, attack))

    @property
    def rows(self) -> list[Row]:
        """Those that have a line, in their order."""
        return [row for row in (*PARTS, *COMPOSITIONS) if self.of(row.name)]


def affordable(runs: Runs) -> list[Row]:
    """The rows that cost at most what Fast-BAT costs, but for the references."""
    return [row for row in runs.rows if row.name not in REFERENCES and (runs.cost(row.name) or math.inf) <= 1.001]


def chosen(runs: Runs) -> Row | None:
    """Of those with a run for every seed, the row with the best held-out accuracy."""
    rows = [row for row in affordable(runs) if len(runs.held_out(row.name)) >= runs.setting.seeds]
    return max(rows, key=lambda row: statistics.mean(runs.held_out(row.name).values()), default=None)


def machines(records: Sequence[Mapping[str, Any]]) -> str:
    """When, on what and with what."""
    made = {
        (r["date"], r["device"], f"torch {r['versions']['torch']}, Python {r['versions']['python']}")
        for r in records
        if "date" in r
    }
    dates = sorted({date for date, *_ in made})
    others = sorted({f"{device}, one thread a run, {versions}" for _, device, versions in made})
    return f"{dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}, {'; '.join(others)}" if made else "no runs"


def text_of(value: Any) -> str:
    return "–" if value is None else str(value)
