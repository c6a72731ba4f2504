"""A batch of examples, and the view of them that augmentation took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from .errors import InputError, whole_number

__all__ = ["Batch", "CropFlip", "on_host", "per_sample"]


def on_host(values: Tensor) -> bool:
    """Whether values can be looked at for nothing: on a CPU, in code that is not being compiled.

    Elsewhere a look would wait for the device, or break the graph.
    """
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


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


@dataclass(frozen=True, init=False, eq=False)
class Batch:
    """Examples as every problem and solver sees them: tensors with a leading batch axis, of any type and shape.

    Args:
        x: inputs ``[B, ...]``: images, features, token numbers, ...
        y: targets ``[B, ...]``: class labels (int64), real values, ...; None where there are none.
        index: ``[B]`` positions in the training set, needed by whatever is remembered per example (ATTA, ATAS).
        view: the crop and flip that produced ``x``, so that what is remembered follows the image.
        examples: how many positions there are, where that is known: memories are then reserved as a whole.
        more: further tensors ``[B, ...]`` by name, indexed and moved along with x. A loss's ``prepare`` keeps what it
            computes once per solve here; targeted lower levels keep ``target``, the classes aimed at.

    Raises:
        InputError: where the lengths do not agree.
    """

    x: Tensor
    y: Tensor | None
    index: Tensor | None
    view: CropFlip | None
    examples: int | None
    more: Mapping[str, Tensor]

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        index: Tensor | None = None,
        view: CropFlip | None = None,
        examples: int | None = None,
        **more: Tensor,
    ) -> None:
        if x.ndim < 1:
            raise InputError("x is a single number; a batch is [B, ...]")
        for name, value in {"y": y, "index": index, **more}.items():
            if value is not None and (value.ndim < 1 or len(value) != len(x)):
                raise InputError(f"{name} has shape {tuple(value.shape)}; {len(x)} inputs need [{len(x)}, ...]")
        if index is not None and index.ndim != 1:
            raise InputError(f"index has shape {tuple(index.shape)}; it must be [{len(x)}]")
        if examples is not None:
            whole_number("examples", examples, 1)
        fields = {"x": x, "y": y, "index": index, "view": view, "examples": examples, "more": more}
        for name, field in fields.items():
            object.__setattr__(self, name, field)

    def __len__(self) -> int:
        return len(self.x)

    def _map(self, function: Callable[[Any], Any]) -> Batch:
        """The batch with ``function`` applied to every tensor and to the view."""
        values: dict[str, Any] = {"x": self.x, "y": self.y, "index": self.index, "view": self.view, **self.more}
        mapped: dict[str, Any] = {name: None if value is None else function(value) for name, value in values.items()}
        return Batch(**mapped, examples=self.examples)

    def __getitem__(self, rows: Any) -> Batch:
        """The examples at ``rows`` (a slice, mask or index tensor), every tensor with them."""
        if isinstance(rows, int):
            raise InputError(f"batch[{rows}] is one example without a batch axis; use batch[{rows}:{rows + 1}]")
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on ``device``."""
        return self._map(lambda value: value.to(device))

    def replace(self, **tensors: Any) -> Batch:
        """The batch with these in place of its own; names that are no argument of :class:`Batch` go to ``more``."""
        own = {"x": self.x, "y": self.y, "index": self.index, "view": self.view, "examples": self.examples}
        return Batch(**{**own, **self.more, **tensors})

    def repeat(self, times: int) -> Batch:
        """Each example ``times`` times, copies side by side: rows ``i·times … (i+1)·times − 1`` are example i."""
        return self[torch.arange(len(self), device=self.x.device).repeat_interleave(times)]
