"""Figures that hold several runs next to each other: one colour, dash and marker for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from .style import BLUE, GREY, SERIES, Line, plt, save

__all__ = ["Panel", "accuracy_by_radius", "curves", "legible", "mean_curve", "one_curve", "seconds"]

Epochs = Sequence[Mapping[str, Any]]  # the lines of a metrics.jsonl
WIDTH = 8.6  # inches: a page's width, at letters of the text's size


class Panel(NamedTuple):
    """One quantity of ``metrics.jsonl`` against the epoch; ``percent``: of accuracies; ``low``: the axis' start."""

    key: str
    label: str
    percent: bool = False
    low: float | None = 0.0


def legible(label: str, most: int = 40) -> str:
    """A label that matplotlib draws as it is: no mathematics, no hiding of what begins with _, nothing too long."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in label)
    if len(text) > most:
        text = text[: most // 2] + "…" + text[1 - most // 2 :]
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def one_curve(lines: Epochs, key: str) -> dict[int, float]:
    """epoch -> value, of the epochs that have a finite one."""
    values = {}
    for line in lines:
        value = line.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            values[int(line["epoch"])] = float(value)
    return values


def mean_curve(runs: Sequence[Epochs], key: str) -> dict[int, float]:
    """epoch -> mean over the runs, of the epochs that all runs with the quantity have."""
    each = [curve for lines in runs if (curve := one_curve(lines, key))]
    common = set.intersection(*map(set, each)) if each else set()
    return {epoch: sum(curve[epoch] for curve in each) / len(each) for epoch in sorted(common)}


def curves(
    groups: Mapping[str, Sequence[Epochs]], panels: Sequence[Panel], path: Path, order: Sequence[str] = ()
) -> None:
    """A panel for each quantity; a line for each group, thick for the mean over its seeds and thin for each of them.

    order: all groups of a page, so that each has one style in all its figures.
    """
    order = list(order) or list(groups)
    rows = math.ceil(len(panels) / 2)
    figure, grid = plt.subplots(
        rows, min(2, len(panels)), figsize=(WIDTH, 2.65 * rows), layout="constrained", squeeze=False
    )
    longest = max((len(mean_curve(runs, p.key)) for runs in groups.values() for p in panels), default=0)
    thin: dict[str, Any] = {"lw": 0.7, "alpha": 0.45} if len(groups) < 4 else {"lw": 0.5, "alpha": 0.2}
    for axes, panel in zip(grid.flat, panels, strict=False):
        scale = 100 if panel.percent else 1
        for label, runs in groups.items():
            place = order.index(label)
            line = _line(place)
            if len(runs) > 1:
                for lines in runs:
                    curve = one_curve(lines, panel.key)
                    axes.plot(list(curve), [scale * v for v in curve.values()], color=line.color, **thin)
            mean = mean_curve(runs, panel.key)
            every = max(1, math.ceil(longest / (8 if len(groups) < 4 else 5)))
            axes.plot(
                list(mean),
                [scale * v for v in mean.values()],
                **line._asdict(),
                **_size(place),
                markevery=(place % every, every),
            )
        axes.set_xlabel("epoch")
        axes.set_title(panel.label, loc="left", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if panel.percent:
            axes.set_ylim(0, 102)
        elif panel.low is not None:
            axes.set_ylim(bottom=min(panel.low, axes.get_ylim()[0]) if axes.dataLim.y0 < panel.low else panel.low)
        _quiet(axes)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    _legend(figure, list(groups), order)
    save(figure, path)


def accuracy_by_radius(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: Path,
    trained: float | None = None,
    in_255ths: bool = False,
    order: Sequence[str] = (),
) -> None:
    """attack -> group -> (ε, accuracy) by rising ε; ``trained`` is marked; ``in_255ths`` for ticks such as 8/255.

    order: as in :func:`curves`.
    """
    groups = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    order = list(order) or groups
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(WIDTH if columns == 2 else 6.2, 3.4 * rows), layout="constrained", squeeze=False
    )
    for axes, (attack, panel) in zip(grid.flat, panels.items(), strict=False):
        for label, curve in panel.items():
            place = order.index(label)
            axes.plot(
                [e for e, _ in curve],
                [100 * a for _, a in curve],
                **_line(place)._asdict(),
                **_size(place),
                clip_on=False,
            )
        largest = max(e for curve in panel.values() for e, _ in curve)
        if trained is not None and trained <= largest:
            axes.axvline(trained, color=GREY, linewidth=0.9, zorder=0)
            right = trained > 0.7 * largest
            axes.annotate(
                "ε of the threat",
                (trained, 101),
                xytext=(-3 if right else 3, 0),
                textcoords="offset points",
                ha="right" if right else "left",
                va="top",
                color=GREY,
                fontsize=9,
            )
        axes.set(xlabel="ε", ylim=(0, 102), xlim=(0, 1.03 * largest))
        axes.set_title(f"test accuracy under {legible(attack, 24)} (%)", loc="left", fontsize=10)
        if in_255ths:
            step = 2 ** max(0, math.ceil(math.log2(255 * largest / (5 if columns == 2 else 9))))
            axes.xaxis.set_major_locator(FixedLocator([k / 255 for k in range(0, round(255 * largest) + 1, step)]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{255 * x:.0f}/255" if x else "0"))
        _quiet(axes)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    _legend(figure, groups, order)
    save(figure, path)


def seconds(groups: Mapping[str, Sequence[float]], path: Path) -> None:
    """A bar for each group: the mean over its runs of the seconds an epoch takes; a dot for each run."""
    means = [sum(values) / len(values) for values in groups.values()]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.8 + 0.36 * len(groups)), layout="constrained")
    places = range(len(groups))
    axes.barh(places, means, height=0.62, color=BLUE)
    for place, values, mean in zip(places, groups.values(), means, strict=True):
        if len(values) > 1:
            axes.plot(values, [place] * len(values), "o", color="white", mec="black", ms=4.5, mew=0.8)
        end = max(max(values), mean)
        axes.annotate(f"{mean:.3g} s", (end, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [legible(label) for label in groups])
    axes.invert_yaxis()
    axes.set(xlabel="training time per epoch (s)", xlim=(0, 1.14 * max(max(v) for v in groups.values())))
    axes.tick_params(axis="y", length=0)
    _quiet(axes)
    save(figure, path)


def _line(place: int) -> Line:
    return SERIES[place % len(SERIES)]


def _size(place: int) -> dict[str, Any]:
    """Hollow markers, and then thin lines, where there are more groups than styles."""
    around = place // len(SERIES)
    hollow = {"markerfacecolor": "white"} if around % 2 else {}
    return {"markersize": 4.5, "linewidth": 1.8 if around < 2 else 1.0, **hollow}


def _legend(figure: Figure, labels: Sequence[str], order: Sequence[str]) -> None:
    if len(order) < 2:
        return
    places = [order.index(label) for label in labels]
    handles = [Line2D([], [], **_line(i)._asdict(), **_size(i)) for i in places]
    shown = [legible(label) for label in labels]
    columns = max(1, min(4, len(labels), 100 // (max(map(len, shown)) + 8)))
    figure.legend(handles, shown, loc="outside upper center", ncols=columns, frameon=False, handlelength=3.2)


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
