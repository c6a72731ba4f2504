"""What an epoch after epoch of training looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..train import rank
from .style import BLUE, GREY, ORANGE, plt, save

__all__ = ["curves"]


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
