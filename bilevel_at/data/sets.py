"""What an image set is, and the one that lies in memory."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["ImageSet", "Images", "check_images"]

Set = TypeVar("Set", bound="ImageSet")


def check_images(x: Tensor, y: Tensor, classes: int | None = None) -> None:
    """Raise :class:`InputError` unless x is floating point in [0, 1] and y int64 in 0 … classes − 1.

    The data is looked at, for which a GPU is waited for.
    """
    if not x.is_floating_point():
        raise InputError(f"x is {x.dtype}; images are floating point in [0, 1] (divide uint8 by 255)")
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"x has values from {low:g} to {high:g}; images lie in [0, 1] (normalise in the model); "
            "of inputs that are no images, attack with problem.lower.solve (docs/beyond_images.md)"
        )
    if y.dtype != torch.int64 or y.shape != (len(x),):
        raise InputError(f"y is {y.dtype} of shape {tuple(y.shape)}; labels are int64 [{len(x)}] (y.long())")
    least, most = int(y.min()), int(y.max())
    if least < 0 or (classes is not None and most >= classes):
        bad = least if least < 0 else most
        raise InputError(f"label {bad} is out of range; labels are 0 … {'classes' if classes is None else classes} − 1")


class ImageSet(ABC):
    """Labelled images of one shape: :class:`Images` in memory, :class:`~bilevel_at.data.Streamed` from files.

    y: labels ``[N]``, int64, on ``device``. classes: how many there are; labels are 0 … classes − 1.

    ``images[rows]`` (a tensor of positions, a mask, or a slice) is the set of those examples, and
    ``images[rows].pixels()`` what they look like: this costs nothing before ``pixels`` is called.
    """

    y: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.y)

    @property
    def device(self) -> torch.device:
        """Where ``y`` is, and where ``pixels`` are given."""
        return self.y.device

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @abstractmethod
    def __getitem__(self: Set, rows: Tensor | slice) -> Set: ...

    @abstractmethod
    def pixels(self) -> Tensor:
        """The images as a model sees them at evaluation: ``[N, C, H, W]``, float32 in [0, 1], on ``device``."""

    @abstractmethod
    def to(self: Set, device: torch.device | str) -> Set:
        """The same set on another device."""

    @abstractmethod
    def sha256(self) -> str:
        """A fingerprint that differs where the images, their labels or their order differ."""

    def sample(self: Set, n: int, seed: int = 0) -> Set:
        """``n`` random examples, or all where there are fewer; the same ones for the same seed."""
        return self[self._shuffled(seed)[:n]]

    def split(self: Set, fraction: float, seed: int = 0) -> tuple[Set, Set]:
        """(the rest, a random ``fraction`` held out, at least one); the same split for the same seed."""
        order = self._shuffled(seed)
        count = max(1, round(fraction * len(self)))
        return self[order[count:]], self[order[:count]]

    def _shuffled(self, seed: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Images(ImageSet):
    """An image set in memory: ``x [N, C, H, W]`` uint8 in 0 … 255 or float32 in [0, 1], ``y [N]`` int64."""

    x: Tensor
    y: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        c, h, w = self.x.shape[1:]
        return c, h, w

    def __getitem__(self, rows: Tensor | slice) -> Images:
        return Images(self.x[rows], self.y[rows], self.classes)

    def pixels(self) -> Tensor:
        return self.x.float() / 255 if self.x.dtype == torch.uint8 else self.x

    def to(self, device: torch.device | str) -> Images:
        return Images(self.x.to(device), self.y.to(device), self.classes)

    def sha256(self) -> str:
        """Of the pixels and labels."""
        digest = hashlib.sha256()
        for part in (self.x, self.y):
            digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()
