"""The figure of ``overfitting.py``: held-out accuracy by epoch at one ε, and beneath it what warns best."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from overfitting_runs import COMPOSITIONS
from overfitting_warnings import CAUGHT, Cases, Pair, Predictor, onset, predictors

Records = Sequence[Mapping[str, Any]]


def shown_epsilon(records: Records) -> float:
    """The smallest ε at which the most runs collapse."""
    collapses: dict[float, int] = {}
    for record in records:
        epsilon = record["settings"]["epsilon"]
        collapses[epsilon] = collapses.get(epsilon, 0) + (onset(record) is not None)
    return min(collapses, key=lambda epsilon: (-collapses[epsilon], epsilon))


def series(record: Mapping[str, Any], value: Callable[[Pair], float | None]) -> dict[int, float]:
    """The predictor by epoch, after a collapse too, where it is known."""
    lines, points = record["epochs"], {}
    for number, line in enumerate(lines, 1):
        before = lines[number - 2] if number > 1 else None
        pair = Pair(record["key"], "", record["settings"]["epsilon"], 0, line, before, False, False)
        if (point := value(pair)) is not None:
            points[number] = point
    return points


def panel(axes: Axes, records: Records, value: Callable[[Pair], float | None], ahead: int) -> None:
    """A thick line for each composition's mean, thin ones for the seeds of those that collapse, and crosses.

    ahead: how many epochs before the collapse a run's cross is.
    """
    for method, look in COMPOSITIONS.items():
        runs = [r for r in records if r["settings"]["method"] == method and r["epochs"]]
        every = [series(run, value) for run in runs]
        for run, points in zip(runs, every, strict=True):
            first = onset(run)
            if any(onset(other) is not None for other in runs):
                axes.plot(list(points), list(points.values()), color=look.color, lw=0.6, alpha=0.5)
            if first is not None and first - ahead in points:
                place = first - ahead
                axes.plot(place, points[place], "x", color=look.color, ms=9, mew=2.2, zorder=5)
        epochs = sorted(set.intersection(*map(set, every))) if every else []
        means = [statistics.mean(points[epoch] for points in every) for epoch in epochs]
        if runs:
            axes.plot(epochs, means, look.dash, color=look.color, marker=look.marker, ms=3.5, lw=1.4, label=look.title)


def draw(records: Records, best: tuple[Predictor, Cases] | None, path: Path) -> str:
    """Draw it; the caption."""
    epsilon = shown_epsilon(records)
    here = [r for r in records if r["settings"]["epsilon"] == epsilon]
    predictor = best[0] if best else next(predictors())
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6.2), layout="constrained", sharex=True)
    panel(above, here, lambda pair: 100 * pair.line["robust"], 0)
    above.set(ylabel="held-out PGD-10 (%)", ylim=(0, None))
    panel(below, here, predictor.value, 1)
    below.set(xlabel="epoch", ylabel=predictor.name, yscale=predictor.scale)
    caption = (
        f"What to see: ε = {epsilon:g}/255, means over seeds (thick) and the seeds of compositions that collapse "
        "(thin). Above, a cross is the first epoch of a collapse; below, the epoch before it, in which "
        f"{predictor.name} "
    )
    if best:
        sign = best[1].sign()
        threshold = sign * best[1].threshold()
        below.axhline(threshold, color="#555555", lw=0.9, ls=":")
        caption += (
            f"would have to be {'above' if sign > 0 else 'below'} the dotted line, which catches {100 * CAUGHT:g} % "
        )
        caption += "of the collapses at all ε, for an alarm."
    else:
        caption += "would have to give an alarm."
    for axes in (above, below):
        axes.tick_params(labelsize=8)
        axes.grid(color="#e4e4e4", lw=0.6)
    below.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return caption
