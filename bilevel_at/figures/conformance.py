"""Relative error of hypergradients against the products that they take: a panel for each problem."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.lines import Line2D

from ..conformance.measure import Conformance
from .style import GREY, SERIES, Line, plt, save

__all__ = ["draw"]

SMALLEST = 1e-17
"""Where an error of exactly 0 is drawn."""

MARKERS = "os^DvPX"
DASHES = ("-", "--", ":", "-.")


def draw(found: Conformance, path: Path) -> None:
    """Write the figure.

    Args:
        found: what was measured. Methods with one setting are points, others lines; those
            without products are left out.
        path: of the PNG.
    """
    names = list(found.problems)
    figure, axes = plt.subplots(math.ceil((len(names) + 1) / 2), 2, figsize=(8.6, 12.5), layout="constrained")
    panels = list(axes.flat)
    lines = _lines(found)
    for panel, name in zip(panels, names, strict=False):
        for row in found.rows:
            label = row.library + ": " + row.method
            if row.problem == name and label in lines:
                points = [(p.products, max(p.error, SMALLEST)) for p in row.points if math.isfinite(p.error)]
                if points:
                    panel.plot(*zip(*points, strict=True), **lines[label]._asdict(), markersize=4, linewidth=1.1)
        panel.set(xscale="log", yscale="log", ylim=(SMALLEST / 2, 40), title=name)
        panel.set_xlim(0.8, 2000)
        panel.grid(True, color=GREY, alpha=0.2, linewidth=0.5)
    for panel in panels[len(names) :]:
        panel.axis("off")
    for panel in panels[: len(names)]:
        panel.set_xlabel("products with second derivatives")
        panel.set_ylabel("relative error")
    handles = [Line2D([], [], **line._asdict(), markersize=4, label=label) for label, line in lines.items()]
    panels[-1].legend(handles=handles, loc="center left", fontsize=7.5, frameon=False)
    save(figure, path)


def _lines(found: Conformance) -> dict[str, Line]:
    """Library and method -> a colour for each library, and a marker and dash for each of its methods."""
    methods: dict[str, dict[str, None]] = {}
    for row in found.rows:
        if any(point.products for point in row.points):
            methods.setdefault(row.library, {})[row.method] = None
    return {
        f"{library}: {method}": Line(series.color, DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)])
        for series, (library, names) in zip(SERIES, methods.items(), strict=False)
        for place, method in enumerate(names)
    }
