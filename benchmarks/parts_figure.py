"""The figure of ``parts.py``: what each part adds, with its 95 % interval, a panel for each data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from parts_rows import COMPOSITIONS, PARTS, Row
from parts_settings import CHEAP

__all__ = ["draw"]

CLEAR, UNCLEAR = "#1f5fa8", "#8a8a8a"


def draw(every: Sequence[Any], path: Path) -> bool:
    """Differences under the cheap strong attack by row, grouped by part; rows that no panel has are left out.

    Returns whether there is anything to draw.
    """
    panels = [runs for runs in every if any(_gap(runs, row) for row in (*PARTS, *COMPOSITIONS))]
    rows = [row for row in (*PARTS, *COMPOSITIONS) if any(_gap(runs, row) for runs in panels)]
    if not rows:
        return False
    figure, grid = plt.subplots(
        1, len(panels), figsize=(8.5, 0.23 * len(rows) + 1.2), sharey=True, layout="constrained", squeeze=False
    )
    places = _places(rows)
    for axes, runs in zip(grid[0], panels, strict=True):
        low, high = _limits([gap for row in rows if (gap := _gap(runs, row))])
        for row in rows:
            gap = _gap(runs, row)
            if gap is None:
                continue
            if not low < gap.mean < high:
                _beyond(axes, gap.mean, places[row.name], low if gap.mean < 0 else high)
                continue
            color = CLEAR if gap.clear else UNCLEAR
            axes.errorbar(
                gap.mean,
                places[row.name],
                xerr=gap.half if gap.n > 1 else None,
                fmt="o",
                color=color,
                markerfacecolor=color if gap.clear else "white",
                markersize=4.5,
                linewidth=1.3,
            )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(runs.setting.title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_xlabel("points", fontsize=8)
        axes.set_xlim(low, high)
    _groups(grid[0], rows, places)
    grid[0][0].set_yticks([places[row.name] for row in rows], [f"{row.name}" for row in rows], fontsize=8)
    grid[0][0].set_ylim(max(places.values()) + 0.8, -0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _gap(runs: Any, row: Row) -> Any:
    return runs.difference(row.name, row.beside, CHEAP) if row.beside else None


def _limits(gaps: Sequence[Any]) -> tuple[float, float]:
    """Of the axis: most rows; one that loses everything is cut off at −15 points."""
    low = min(-3.0, *(gap.mean - (gap.half if gap.n > 1 else 0) for gap in gaps)) - 0.5
    high = max(3.0, *(gap.mean + (gap.half if gap.n > 1 else 0) for gap in gaps)) + 0.5
    return max(low, -15.0), min(high, 15.0)


def _beyond(axes: Any, value: float, y: float, edge: float) -> None:
    """A number with an arrow, for what is beyond the axis."""
    left = value < 0
    axes.annotate(
        f"{value:+.0f}",
        (edge, y),
        xytext=(28 if left else -28, 0),
        textcoords="offset points",
        ha="left" if left else "right",
        va="center",
        fontsize=8,
        color=CLEAR,
        arrowprops={"arrowstyle": "->", "color": CLEAR},
    )


def _places(rows: Sequence[Row]) -> dict[str, float]:
    """Heights, with a space between parts."""
    places, y, part = {}, 0.0, rows[0].part
    for row in rows:
        if row.part != part:
            y, part = y + 0.5, row.part
        places[row.name] = y
        y += 1
    return places


def _groups(panels: Sequence[Any], rows: Sequence[Row], places: dict[str, float]) -> None:
    """A band behind each second part, and their names."""
    parts = list(dict.fromkeys(row.part for row in rows))
    for part in parts[::2]:
        heights = [places[row.name] for row in rows if row.part == part]
        for axes in panels:
            axes.axhspan(min(heights) - 0.7, max(heights) + 0.7, color="#f3f3f3", linewidth=0, zorder=0)
    for part in parts:
        top = min(places[row.name] for row in rows if row.part == part)
        panels[-1].annotate(
            part,
            (1, top - 0.5),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            style="italic",
            color="#555555",
        )
