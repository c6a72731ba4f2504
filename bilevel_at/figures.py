"""The figures a run leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import torch
from matplotlib import pyplot as plt
from torch import nn

from .batch import Batch
from .data import ImageSet
from .evaluate import Attack
from .modes import attack_mode
from .train import rank

__all__ = ["curves", "examples"]

BLUE, ORANGE, GREY = "#1f5fa8", "#d9730d", "#666666"


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
    figure.savefig(path, dpi=120)
    plt.close(figure)


def examples(model: nn.Module, images: ImageSet, attack: Attack, path: Path, count: int = 8) -> None:
    """Test images, their perturbations and the sums, with what the model says of each."""
    if attack.lower is None:
        return
    count = min(count, len(images))
    batch = Batch(images[slice(0, count)].pixels(), images.y[:count])
    generator = torch.Generator(images.device).manual_seed(0)
    delta = attack.lower.solve(model, batch, generator=generator).delta
    with attack_mode(model, "eval"), torch.no_grad():
        said = [model(batch.x + d).argmax(1).tolist() for d in (torch.zeros_like(delta), delta)]
    limit = max(delta.abs().max().item(), 1e-12)
    rows = [(batch.x, 0.0, 1.0, "gray"), (delta, -limit, limit, "RdBu"), (batch.x + delta, 0.0, 1.0, "gray")]
    names = ["image", f"perturbation\n(±{limit:.2g})", "attacked"]
    figure, axes = plt.subplots(3, count, figsize=(1.1 * count + 1, 4.2), layout="constrained", squeeze=False)
    for row, (values, low, high, cmap) in enumerate(rows):
        for column in range(count):
            pixels = values[column].cpu().numpy()
            if pixels.shape[0] == 1:
                axes[row, column].imshow(pixels[0], cmap=cmap, vmin=low, vmax=high)
            else:
                axes[row, column].imshow(((pixels - low) / (high - low)).clip(0, 1).transpose(1, 2, 0))
            axes[row, column].set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(names[row])
    for row, answers in ((0, said[0]), (2, said[1])):
        for column, answer in enumerate(answers):
            right = answer == int(batch.y[column])
            axes[row, column].set_title(
                f"says {answer}" + ("" if right else " ✗"), fontsize=9, color="black" if right else ORANGE
            )
    figure.suptitle(f"{attack.name.upper()} at ε = {attack.epsilon:.3g}; ✗ marks a wrong answer", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
