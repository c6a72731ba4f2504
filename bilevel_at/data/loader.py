"""Batches of data that lives on the training device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from ..batch import Batch, CropFlip
from .sets import Images

__all__ = ["Augment", "Loader"]

Augment = Literal["none", "crop-flip"]


class Loader:
    """Shuffled batches with their indices and, with ``augment="crop-flip"``, the view each image was seen in.

    The order and the views of an epoch depend on ``(seed, epoch)`` alone, so a resumed run sees what an unbroken one
    would have. ``padding`` is that of the crop: 4 for 32×32 images.
    """

    def __init__(
        self, images: Images, batch_size: int, seed: int = 0, augment: Augment = "none", padding: int = 4
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.augment, self.padding = augment, padding

    def __len__(self) -> int:
        full, left = divmod(len(self.images), self.batch_size)
        return full + (left > 1 or (left == 1 and full == 0))  # a last one joins the batch before it

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch ``epoch``."""
        device = self.images.x.device
        generator = torch.Generator(device).manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self.images), generator=generator, device=device)
        batches = list(order.split(self.batch_size))
        if self.batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
            # One example has no batch statistics: it joins the batch before it.
            batches[-2:] = [torch.cat(batches[-2:])]
        for index in batches:
            x, view = self.images[index].pixels(), None
            if self.augment == "crop-flip":
                view = CropFlip.draw(len(index), self.padding, generator, device)
                x = view.apply(view.pad(x))
            yield Batch(x, self.images.y[index], index, view)
