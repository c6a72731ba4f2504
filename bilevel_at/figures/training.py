"""Training curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..runs.metrics import rank
from .comparison import legible, one_curve
from .style import BLUE, GREY, ORANGE, plt, save

__all__ = ["curves", "epochs"]


def curves(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss, held-out accuracies and learning rate against the epoch."""
    epochs = [m["epoch"] for m in metrics]
    best = max(metrics, key=rank)["epoch"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(epochs, [m["loss"] for m in metrics], color=BLUE)
    left.set(xlabel="epoch", ylabel="training loss under attack", ylim=(0, None))
    rate = left.twinx()
    rate.plot(epochs, [m["lr"] for m in metrics], color=GREY, linestyle=":")
    rate.set_ylabel("learning rate (dotted)", color=GREY)
    rate.set_ylim(0, None)
    right.plot(epochs, [100 * m["clean"] for m in metrics], color=BLUE, linestyle="--", label="clean")
    right.plot(epochs, [100 * m["robust"] for m in metrics], color=ORANGE, label=metrics[0]["attack"].upper())
    right.axvline(best, color=GREY, linewidth=0.8)
    right.annotate(f"best: {best}", (best, 2), xytext=(-3, 0), textcoords="offset points", ha="right", color=GREY)
    right.set(xlabel="epoch", ylabel="held-out accuracy (%)", ylim=(0, 102))
    right.legend(loc="lower center", frameon=False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def epochs(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One run: loss, accuracies, learning rate, and gradient alignment where it was measured. Lines bear their names.

    Quantities that an older run has not measured are left out.
    """
    loss, lr, alignment = (one_curve(metrics, key) for key in ("loss", "lr", "alignment"))
    attack = next((str(line["attack"]) for line in metrics if line.get("attack")), "attack")
    accuracies = [
        ("clean", one_curve(metrics, "clean"), BLUE, "--"),
        (f"under {legible(attack)}", one_curve(metrics, "robust"), ORANGE, "-"),
        ("training images,\nas attacked", one_curve(metrics, "train"), GREY, ":"),
    ]
    below = [
        (label, curve)
        for label, curve in (("training loss", loss), ("gradient alignment (cosine)", alignment), ("learning rate", lr))
        if curve
    ]
    figure = plt.figure(figsize=(8.6, 5.4 if below else 3.2), layout="constrained")
    halves = figure.subfigures(2 if below else 1, 1, squeeze=False, height_ratios=[1.25, 1] if below else [1]).flat
    top = halves[0].subplots()
    _accuracies(top, [line for line in accuracies if line[1]])
    if metrics and all({"robust", "clean"} <= set(line) for line in metrics):
        best = max(metrics, key=rank)["epoch"]
        top.axvline(best, color=GREY, linewidth=0.8, zorder=0)
        top.annotate(
            f"best: {best}", (best, 2), (-4, 0), textcoords="offset points", ha="right", color=GREY, fontsize=9
        )
    panels = halves[1].subplots(1, len(below), squeeze=False).flat if below else []
    for axes, (label, curve) in zip(panels, below, strict=True):
        axes.plot(list(curve), list(curve.values()), color=BLUE, marker="o" if len(curve) < 13 else "", markersize=4)
        axes.set_title(label, loc="left", fontsize=10)
        axes.set(ylim=(min(0.0, *curve.values()), 1.02 if curve is alignment else None))
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6 if axes is not top else 12, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e3e3", linewidth=0.6)
    save(figure, path)


def _accuracies(axes: Axes, lines: Sequence[tuple[str, dict[int, float], str, str]]) -> None:
    """Each with its name at its end, the names moved apart where the ends are close."""
    axes.set_ylim(0, 102)
    axes.set_title("accuracy (%), held-out and training", loc="left", fontsize=10)
    ends, last = [], max((max(curve) for _, curve, _, _ in lines), default=1)
    for name, curve, color, dash in lines:
        marker = "o" if len(curve) < 13 else ""
        axes.plot(list(curve), [100 * v for v in curve.values()], color=color, linestyle=dash, marker=marker, ms=4)
        ends.append((100 * list(curve.values())[-1], name, color))
    under = 110.0  # where the last name ends
    for value, name, color in sorted(ends, reverse=True):
        half = 4.5 * (1 + name.count("\n"))
        at = min(value, under - half)
        under = at - half
        axes.annotate(name, (last, at), (7, 0), textcoords="offset points", va="center", color=color, fontsize=9)
