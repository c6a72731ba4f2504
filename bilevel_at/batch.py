"""A batch of examples, and the view of them that augmentation took."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, overload

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["Batch", "CropFlip", "per_sample"]


@overload
def per_sample(value: Tensor, like: Tensor) -> Tensor: ...
@overload
def per_sample(value: float, like: Tensor) -> float: ...
@overload
def per_sample(value: Tensor | float, like: Tensor) -> Tensor | float: ...
def per_sample(value: Tensor | float, like: Tensor) -> Tensor | float:
    """Reshape ``[B]`` values to ``[B, 1, ..., 1]`` so that they broadcast over ``like``; numbers pass."""
    if isinstance(value, Tensor) and value.ndim == 1:
        return value.reshape(-1, *[1] * (like.ndim - 1))
    return value


@dataclass(frozen=True)
class CropFlip:
    """The random crop and horizontal flip that a batch of images went through.

    An image of size H×W stands in the middle of a canvas padded by ``padding`` on every side; the view is the
    H×W window whose upper left corner is (``top``, ``left``), mirrored where ``flip``. Perturbations kept on the
    canvas move with the image because both go through :meth:`apply`.

    top, left: ``[B]`` int64 in ``0 … 2·padding``. flip: ``[B]`` bool.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    padding: int

    @classmethod
    def draw(cls, n: int, padding: int, generator: torch.Generator | None, device: torch.device) -> CropFlip:
        """Uniform offsets and fair flips."""
        offsets = torch.randint(0, 2 * padding + 1, (2, n), generator=generator, device=device)
        flip = torch.rand(n, generator=generator, device=device) < 0.5
        return cls(offsets[0], offsets[1], flip, padding)

    def pad(self, x: Tensor) -> Tensor:
        """Place images ``[B, C, H, W]`` on a zero canvas ``[B, C, H + 2p, W + 2p]``."""
        p = self.padding
        return torch.nn.functional.pad(x, (p, p, p, p))

    def _gather(self, canvas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = (side - 2 * self.padding for side in canvas.shape[-2:])
        rows = self.top[:, None] + torch.arange(height, device=canvas.device)
        across = torch.arange(width, device=canvas.device)
        columns = self.left[:, None] + torch.where(self.flip[:, None], across.flip(0), across)
        samples = torch.arange(len(canvas), device=canvas.device)
        return samples[:, None, None], rows[:, :, None], columns[:, None, :]

    def apply(self, canvas: Tensor) -> Tensor:
        """The window of each canvas: ``[B, C, H + 2p, W + 2p] -> [B, C, H, W]``."""
        b, i, j = self._gather(canvas)
        return canvas[b, :, i, j].permute(0, 3, 1, 2).contiguous()

    def write(self, canvas: Tensor, window: Tensor) -> Tensor:
        """A copy of ``canvas`` with ``window`` put back where :meth:`apply` reads it."""
        b, i, j = self._gather(canvas)
        canvas = canvas.clone()
        canvas[b, :, i, j] = window.permute(0, 2, 3, 1)
        return canvas

    def to(self, device: torch.device | str) -> CropFlip:
        return CropFlip(self.top.to(device), self.left.to(device), self.flip.to(device), self.padding)

    def __getitem__(self, rows: Any) -> CropFlip:
        return CropFlip(self.top[rows], self.left[rows], self.flip[rows], self.padding)


@dataclass(frozen=True)
class Batch:
    """Examples as every problem and solver sees them.

    x: inputs ``[B, ...]`` in [0, 1]; y: labels ``[B]``, int64.
    index: ``[B]`` positions in the training set, needed by whatever is remembered per example (ATTA, ATAS).
    view: the crop and flip that produced ``x``, so that what is remembered follows the image.
    target: ``[B]`` classes a targeted attack aims at; set by targeted lower levels, not by users.
    reference: ``[B, ...]`` what an attack loss would otherwise compute anew in every pass, such as the prediction at x
        that a divergence is measured from; set by its ``prepare`` (:meth:`LowerProblem.prepare`), not by users.

    Raises :class:`InputError` where the lengths do not agree.
    """

    x: Tensor
    y: Tensor
    index: Tensor | None = None
    view: CropFlip | None = None
    target: Tensor | None = None
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim < 2:
            raise InputError(f"x has shape {tuple(self.x.shape)}; a batch is [B, ...] with at least two axes")
        if self.y.dtype != torch.int64:
            raise InputError(f"y is {self.y.dtype}; labels are int64 (y.long())")
        for name in ("y", "index", "target"):
            value = getattr(self, name)
            if value is not None and value.shape != (len(self.x),):
                raise InputError(f"{name} has shape {tuple(value.shape)}; {len(self.x)} inputs need [{len(self.x)}]")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Any) -> Batch:
        """The examples at ``rows`` (a slice, mask or index tensor), every field with them."""
        held = ((f.name, getattr(self, f.name)) for f in fields(self))
        taken: dict[str, Any] = {name: None if value is None else value[rows] for name, value in held}
        return Batch(**taken)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on ``device``."""
        held = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in held}
        return Batch(**moved)

    def aimed_at(self, target: Tensor) -> Batch:
        """The batch with a target class per example."""
        return replace(self, target=target)

    def repeat(self, times: int) -> Batch:
        """Each example ``times`` times, copies side by side: rows ``i·times … (i+1)·times − 1`` are example i."""
        return self[torch.arange(len(self), device=self.x.device).repeat_interleave(times)]

    def check(self, classes: int | None = None) -> Batch:
        """Return the batch, or raise :class:`InputError` where a value is out of range (this waits for a GPU)."""
        if not self.x.is_floating_point():
            raise InputError(f"x is {self.x.dtype}; images are floating point in [0, 1] (divide uint8 by 255)")
        low, high = self.x.min().item(), self.x.max().item()
        if not (low >= 0 and high <= 1):
            raise InputError(f"x has values from {low:g} to {high:g}; images lie in [0, 1] (normalise in the model)")
        low_label, high_label = int(self.y.min()), int(self.y.max())
        if low_label < 0 or (classes is not None and high_label >= classes):
            bad = low_label if low_label < 0 else high_label
            raise InputError(
                f"label {bad} is out of range; labels are 0 … {'classes' if classes is None else classes} − 1"
            )
        return self
