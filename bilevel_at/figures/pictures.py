"""Images before and after an attack."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..data import ImageSet
from ..evaluate import Attack
from ..modes import attack_mode
from .comparison import legible
from .style import ORANGE, plt, save

__all__ = ["examples"]


def examples(
    model: nn.Module, images: ImageSet, attack: Attack, path: Path, attacked: Tensor | None = None, count: int = 8
) -> None:
    """Test images, their perturbations and the sums, with the model's predictions.

    attacked: the first images as the attack left them in an evaluation; without it, ``count`` are attacked now.
    """
    if not attack.stages:
        return
    count = min(count, len(images)) if attacked is None else len(attacked)
    labels = images.y[:count]
    batch = Batch(images[slice(0, count)].pixels(), labels)
    generator = torch.Generator(images.device).manual_seed(0)
    with attack_mode(model, "eval"):
        delta = (attack.perturb(model, batch, generator) if attacked is None else attacked) - batch.x
        with torch.no_grad():
            predictions = [model(batch.x + d).argmax(1).tolist() for d in (torch.zeros_like(delta), delta)]
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
    for row, answers in ((0, predictions[0]), (2, predictions[1])):
        for column, answer in enumerate(answers):
            right = answer == int(labels[column])
            axes[row, column].set_title(
                f"says {answer}" + ("" if right else " ✗"), fontsize=9, color="black" if right else ORANGE
            )
    threat = attack.threat
    where = f"at ε = {attack.epsilon:.3g}" if threat is None or threat.is_ball else f"in {legible(threat.name, 60)}"
    figure.suptitle(f"{attack.name.upper()} {where}; ✗ marks a wrong answer", fontsize=10)
    save(figure, path)
