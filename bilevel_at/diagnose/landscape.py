"""The loss on a plane through an image: along the gradient's sign, and along a random one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batch import Batch
from ..data.sets import check_images
from ..division import divided
from ..errors import InputError, positive, whole_number
from ..losses import cross_entropy, input_gradient
from ..modes import attack_mode

__all__ = ["Landscape", "loss_landscape"]


@dataclass(frozen=True)
class Landscape:
    """The loss of n images on the plane x + a·sign(∇_x ℓ(x)) + b·r.

    sign_offsets, random_offsets: the a's and b's, ``[P]``, 0 in the middle.
    loss: the cross-entropy at (a_i, b_j), ``[n, P, P]``. predicted: the class there, ``[n, P, P]`` int64.
    margin: max_{k≠y} f_k − f_y there, ``[n, P, P]``, positive where the prediction is wrong, so that its zeros are the
        decision boundary.
    x, y: the images ``[n, C, H, W]`` and their labels ``[n]``.
    """

    sign_offsets: Tensor
    random_offsets: Tensor
    loss: Tensor
    predicted: Tensor
    margin: Tensor
    x: Tensor
    y: Tensor


def loss_landscape(
    model: nn.Module,
    x: Tensor,
    y: Tensor | int,
    radius: float,
    *,
    points: int = 41,
    seed: int = 0,
    batch_size: int = 1024,
) -> Landscape:
    """ℓ(x + a·sign(∇_x ℓ(x)) + b·r) for a, b in −radius … radius, r uniform in {−1, 1}^d, ℓ the cross-entropy.

    x: an image ``[C, H, W]`` or several ``[n, C, H, W]``, in [0, 1]; y: the label, or ``[n]`` int64. points: P, the
    offsets on each axis, an odd number, so that x itself is one of them.

    A point (a, b) is |a| + |b| from x in ℓ∞ (where signs agree in one coordinate and differ in another), so that an ℓ∞
    ball is a diamond here. Points are not clipped to [0, 1], which would bend the plane. Every image has an r of its
    own, from ``seed``. The model is seen in eval mode, without gradients but for the one at x, and left as it was.
    Several processes share the batches of points.

    Raises :class:`InputError` where x, y, radius or points is not of this kind.
    Source: Fast-BAT (Zhang et al., 2022, preprint), figure 1; ATAS (Huang et al., 2023), figures 2 and 9, is similar.
    """
    positive("radius", radius)
    if whole_number("points", points, 3) % 2 == 0:
        raise InputError(f"points is {points}; it must be odd, so that x itself is in the middle")
    if x.ndim not in (3, 4):
        raise InputError(f"x has shape {tuple(x.shape)}; an image is [C, H, W], several are [n, C, H, W]")
    x = x if x.ndim == 4 else x[None]
    labels = torch.as_tensor(y, device=x.device).reshape(-1)
    batch = Batch(x, labels)
    check_images(x, labels)
    random = 2.0 * torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed)).to(x) - 1
    middle = points // 2
    offsets = torch.arange(-middle, middle + 1, dtype=x.dtype, device=x.device) * (radius / middle)
    with attack_mode(model, "eval"):
        sign = input_gradient(cross_entropy, model, batch, torch.zeros_like(x))[0].sign()

        def values(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # Point k of image i is (a, b) = (offsets[k // P], offsets[k % P]).
            i, k = rows // points**2, rows % points**2
            a, b = (offsets[place].reshape(-1, 1, 1, 1) for place in (k // points, k % points))
            with torch.no_grad():
                out, label = model(x[i] + a * sign[i] + b * random[i]), labels[i, None]
            own, others = out.gather(1, label).squeeze(1), out.scatter(1, label, -torch.inf)
            return F.cross_entropy(out, labels[i], reduction="none"), out.argmax(1), others.amax(1) - own

        # In batches: a grid of all images may not fit in memory.
        found = divided(values, torch.arange(len(x) * points**2, device=x.device).split(batch_size))
    grid = (len(x), points, points)
    loss, predicted, margin = (torch.cat(parts).to(x.device).reshape(grid) for parts in zip(*found, strict=True))
    return Landscape(offsets, offsets.clone(), loss, predicted, margin, x, labels)
