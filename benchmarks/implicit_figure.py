"""The figure of ``implicit.md``: accuracy by weight, F and the true loss by epoch, both by the rate of training."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from implicit_cells import Lines, Row, accuracy, last, paired, values
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLORS = {20.0: "#111111", 5.0: "#1f5fa8", 1.25: "#4ea3d9", 0.3: "#d9730d"}
DASHES = {20.0: ("-", "o"), 5.0: ("--", "s"), 1.25: ("-.", "^"), 0.3: (":", "D")}


def by_weight(axes: Axes, lines: Lines) -> None:
    """PGD accuracy by weight, a line for each 1/λ."""
    for step in sorted(lines.values("step", part="scan"), reverse=True):
        weights = lines.values("weight", part="scan", step=step)
        seeds = [values(lines.row(step=step, weight=weight), accuracy("pgd-50-10")) for weight in weights]
        means = [statistics.mean(of) for of in seeds]
        errors = [statistics.stdev(of) if len(of) > 1 else 0.0 for of in seeds]
        dash, marker = DASHES.get(step, ("-", "x"))
        style = {"color": COLORS.get(step, "#7a7a7a"), "ls": dash, "marker": marker, "ms": 4, "capsize": 2}
        axes.errorbar(weights, means, errors, lw=1.4, label=f"1/λ = {step:g}", **style)
    axes.set_xscale("symlog", linthresh=0.005, linscale=0.5)
    axes.set_xticks([0, 0.005, 0.1, 1], ["0", "0.005", "0.1", "1"])
    axes.minorticks_off()
    axes.set(xlabel="weight of the implicit term", ylabel="PGD-50-10 accuracy (%)", ylim=(0, None))
    axes.set_title("test images, last epoch", fontsize=8.5)
    axes.legend(fontsize=8, frameon=False, loc="lower left")


def by_epoch(axes: Axes, lines: Lines) -> None:
    """F and R on training images, with and without the term, at the largest 1/λ."""
    step = max(lines.values("step", part="scan"))
    for weight, color in ((0.0, "#1f5fa8"), (1.0, "#d9730d")):
        row = lines.row(step=step, weight=weight)
        for name, dash, what in (("R", "-", "true loss R"), ("F", ":", "F")):
            epochs, means = mean_looks(row, name)
            label = f"{what}, {'weight 1' if weight else 'weight 0'}"
            axes.plot(epochs, means, dash, color=color, lw=1.6, label=label)
    axes.set(xlabel="epoch", ylabel="cross-entropy", ylim=(0, 4.4))
    axes.set_title(f"training images, 1/λ = {step:g}", fontsize=8.5)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def mean_looks(row: Row, name: str) -> tuple[list[int], list[float]]:
    """The means over the seeds after the epochs that were looked at."""
    series = [[look[name] for look in record["looks"]] for record in row.values()]
    epochs = [look["epoch"] for look in next(iter(row.values()))["looks"]] if row else []
    return epochs, [statistics.mean(column) for column in zip(*series, strict=True)]


def by_rate(axes: Axes, lines: Lines) -> None:
    """What the term changes in 10 epochs from a trained network: F and R, less those without it, by the peak rate."""
    for term, color, words in (("implicit", "#d9730d", "exact"), ("coin", "#4ea3d9", "coin's sign")):
        for name, dash, marker in (("R", "-", "o"), ("F", ":", "s")):
            points = []
            for lr in lines.values("lr", part="after", activation="relu"):
                row = lines.row(part="after", lr=lr, weight=1.0, term=term)
                gap = paired(row, lines.row(part="after", lr=lr), last(name))
                if gap is not None:
                    points.append((lr, gap.mean, gap.error))
            if points:
                rates, means, errors = zip(*points, strict=True)
                style = {"color": color, "ls": dash, "marker": marker, "ms": 4, "capsize": 2, "lw": 1.4}
                axes.errorbar(rates, means, errors, label=f"{name}, {words}", **style)
    axes.axhline(0, color="#7a7a7a", lw=0.6)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_yticks([-0.05, 0, 0.05, 0.1, 0.5, 1, 2], ["−0.05", "0", "0.05", "0.1", "0.5", "1", "2"])
    axes.set(xlabel="peak rate of 10 more epochs", ylabel="cross-entropy, less that without the term")
    axes.set_title("10 epochs from a trained network", fontsize=8.5)
    axes.set_ylim(-0.2, 3)
    if axes.get_legend_handles_labels()[0]:  # one seed has no standard error
        axes.legend(fontsize=8, frameon=False, loc="lower right")


@matplotlib.rc_context({"font.size": 8})
def draw(lines: Lines, path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(8.4, 3.2), layout="constrained")
    by_weight(panels[0], lines)
    by_epoch(panels[1], lines)
    by_rate(panels[2], lines)
    figure.savefig(path, dpi=130)
    plt.close(figure)
