"""The style of all figures. Colours also differ in lightness, so that they are distinct in greyscale."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["BLUE", "GREY", "ORANGE", "SERIES", "Line", "plt", "save"]

BLUE, ORANGE, GREY = "#1f5fa8", "#d9730d", "#666666"


class Line(NamedTuple):
    """One series among several: ``axes.plot(x, y, **line._asdict())``."""

    color: str
    linestyle: str
    marker: str


SERIES = (
    Line("#111111", "-", "o"),
    Line("#d9730d", "--", "s"),
    Line("#1f5fa8", "-.", "^"),
    Line("#a05195", ":", "D"),
    Line("#7fb069", "-", "v"),
    Line("#7a7a7a", "--", "P"),
    Line("#4ea3d9", "-.", "X"),
    Line("#c9a227", ":", "<"),
)


def save(figure: Figure, path: Path) -> None:
    """Write the PNG and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()  # the figure replaces a link, not what it leads to
    figure.savefig(path, dpi=130)
    plt.close(figure)
