"""The figure of ``implicit.md``: accuracy by weight, F and the true loss by epoch, decrease by step length."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from implicit_cells import Lines, Row, accuracy, values
from implicit_measures import LENGTHS
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLORS = {20.0: "#111111", 5.0: "#1f5fa8", 1.25: "#4ea3d9", 0.3: "#d9730d"}
DASHES = {20.0: ("-", "o"), 5.0: ("--", "s"), 1.25: ("-.", "^"), 0.3: (":", "D")}


def by_weight(axes: Axes, lines: Lines) -> None:
    """PGD accuracy by weight, a line for each 1/λ."""
    for step in sorted(lines.values("step", part="scan"), reverse=True):
        weights = lines.values("weight", part="scan", step=step)
        rows = [lines.row(step=step, weight=weight) for weight in weights]
        means = [statistics.mean(values(row, accuracy("pgd-50-10"))) for row in rows]
        errors = [statistics.pstdev(values(row, accuracy("pgd-50-10"))) for row in rows]
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
            label = f"{what}, {'with' if weight else 'without'} the term"
            axes.plot(epochs, means, dash, color=color, lw=1.6, label=label)
    axes.set(xlabel="epoch", ylabel="cross-entropy", ylim=(0, None))
    axes.set_title(f"training images, 1/λ = {step:g}, weight 1 or 0", fontsize=8.5)
    axes.legend(fontsize=8, frameon=False, loc="lower left")


def mean_looks(row: Row, name: str) -> tuple[list[int], list[float]]:
    """The means over the seeds after the epochs that were looked at."""
    series = [[look[name] for look in record["looks"]] for record in row.values()]
    epochs = [look["epoch"] for look in next(iter(row.values()))["looks"]] if row else []
    return epochs, [statistics.mean(column) for column in zip(*series, strict=True)]


def by_length(axes: Axes, lines: Lines) -> None:
    """The decrease of F over what the hypergradient predicts, by length of the step."""
    kinds = {
        "1/λ = 20": ({"step": 20.0}, "#111111", "-"),
        "1/λ = 20, smooth network": ({"step": 20.0, "part": "causes", "activation": "swish"}, "#1f5fa8", "--"),
        "1/λ = 0.3": ({"step": 0.3}, "#d9730d", ":"),
    }
    for label, (settings, color, dash) in kinds.items():
        looks = [
            look
            for weight in (0.0, 1.0)
            for record in lines.row(weight=weight, **settings).values()
            for look in record.get("steps", [])
        ]
        if looks:
            columns = zip(*(look["h"]["own"] for look in looks), strict=True)
            medians = [
                statistics.median(a / (t * look["h"]["slope"]) for a, look in zip(column, looks, strict=True))
                for t, column in zip(LENGTHS, columns, strict=True)
            ]
            axes.plot(LENGTHS, medians, dash, color=color, lw=1.6, label=label)
    axes.axvline(0.1, color="#7a7a7a", lw=0.8)
    axes.text(0.085, -0.92, "peak rate", fontsize=8, rotation=90, ha="right", va="bottom", color="#555555")
    axes.axhline(0.5, color="#7a7a7a", lw=0.6, ls=":")
    axes.set(xlabel="length t of a step along −h", ylabel="decrease of F / predicted", ylim=(-1, 1.5), xscale="log")
    axes.set_title("the same batch, the same z", fontsize=8.5)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 0.12))


@matplotlib.rc_context({"font.size": 8})
def draw(lines: Lines, path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(8.4, 3.2), layout="constrained")
    by_weight(panels[0], lines)
    by_epoch(panels[1], lines)
    by_length(panels[2], lines)
    figure.savefig(path, dpi=130)
    plt.close(figure)
