"""The figure of ``speedrun_cpu.py``: accuracy of each composition, a panel for each time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.lines import Line2D
from speedrun_cpu_columns import Column
from speedrun_page import CHEAP, STRONG

from bilevel_at.figures.style import BLUE, GREY, ORANGE, plt, save

MARKS = {
    None: ("held out, PGD-10", GREY, "o", -0.22),
    CHEAP: (CHEAP, BLUE, "^", 0.0),
    STRONG: ("AutoAttack", ORANGE, "s", 0.22),
}


def draw(columns: Sequence[Column], path: Path) -> None:
    """A panel for each of the first three times; nothing where there are none."""
    columns = [column for column in columns if column.rows][:3]
    if not columns:
        return
    names = columns[0].names
    height = 1.2 + 0.44 * len(names)
    figure, panels = plt.subplots(
        1, len(columns), figsize=(8, height), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axes, column in zip(panels.flat, columns, strict=True):
        for place, name in enumerate(names):
            if name == column.best:
                axes.axhspan(place - 0.45, place + 0.45, color="#e4e4e4", zorder=0)
            if name in column.rows:
                _marks(axes, column, name, place)
        axes.set_title(f"{column.budget:g} minutes of two cores", fontsize=9)
        axes.set_xlabel("accuracy (%)", fontsize=9)
        axes.tick_params(labelsize=9)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    panels.flat[0].set_yticks(range(len(names)), names)
    panels.flat[0].set_ylim(len(names) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=label)
        for label, color, marker, _ in MARKS.values()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    save(figure, path)


def _marks(axes: plt.Axes, column: Column, name: str, place: int) -> None:
    """Mean accuracies of a row, each with the standard error that the number of images gives."""
    for attack, (_, color, marker, shift) in MARKS.items():
        accuracies = column.held_out(name) if attack is None else column.accuracy(name, attack)
        if accuracies:
            axes.errorbar(
                statistics.mean(accuracies.values()),
                place + shift,
                xerr=column.error(name, attack),
                color=color,
                marker=marker,
                markersize=5,
                elinewidth=1,
            )
