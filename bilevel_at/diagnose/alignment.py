"""Gradient alignment: how linear the loss is inside the attacker's ball."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batch import Batch, per_sample
from ..constraints import Constraint
from ..data import ImageSet
from ..division import divided
from ..errors import whole_number
from ..losses import cross_entropy, input_gradient
from ..modes import attack_mode

__all__ = ["gradient_alignment"]


def gradient_alignment(
    model: nn.Module,
    images: ImageSet,
    constraint: Constraint,
    *,
    seed: int = 0,
    batch_size: int = 512,
    samples: int = 1,
) -> Tensor:
    """cos(∇_x ℓ(x), ∇_x ℓ(x + η)) of each example, ``[N]`` in [−1, 1], ℓ the cross-entropy.

    η is drawn from the constraint without its input range, uniform in a ball: x + η may leave [0, 1]. ``samples`` draws
    are averaged; a draw at which a gradient is exactly zero has no angle and is left out, and an example with none left
    is NaN, so take ``nanmean``. Near 1 where one gradient step sees the whole ball, near 0 after catastrophic
    overfitting. The same draws for the same ``seed`` and ``batch_size``; the model is seen in eval mode and left as it
    was. Costs ``samples`` + 1 gradients an example. Several processes share the batches.

    Raises :class:`InputError` where ``samples`` or ``batch_size`` is not at least 1.
    Source: Andriushchenko and Flammarion (2020), equations 5 and 7.
    """
    whole_number("samples", samples, 1)
    whole_number("batch_size", batch_size, 1)
    generator = torch.Generator(images.device).manual_seed(seed)
    ball = constraint.unbounded()

    def batches() -> Iterator[tuple[Batch, list[Tensor]]]:
        for rows in torch.arange(len(images), device=images.device).split(batch_size):
            batch = Batch(images[rows].pixels(), images.y[rows])
            yield batch, [ball.sample(batch.x, generator) for _ in range(samples)]

    def alignment(part: tuple[Batch, list[Tensor]]) -> Tensor:
        batch, draws = part
        clean, _ = input_gradient(cross_entropy, model, batch, torch.zeros_like(batch.x))
        moved = [input_gradient(cross_entropy, model, batch, eta)[0] for eta in draws]
        return torch.stack([_cosine(clean, gradient) for gradient in moved]).nanmean(0)

    with attack_mode(model, "eval"):
        cosines = divided(alignment, batches())
    return torch.cat(cosines).to(images.device) if cosines else torch.empty(0, device=images.device)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """``[B]``, NaN where a or b is exactly zero."""
    # In units of the largest entry, or the squares of a confident network's gradients would underflow to zero.
    scale_a, scale_b = a.abs().flatten(1).amax(1), b.abs().flatten(1).amax(1)
    unit_a, unit_b = (a / per_sample(scale_a, a)).flatten(1), (b / per_sample(scale_b, b)).flatten(1)
    cosine = F.cosine_similarity(unit_a.double(), unit_b.double()).clamp(-1, 1).float()
    return cosine.masked_fill((scale_a == 0) | (scale_b == 0), torch.nan)
