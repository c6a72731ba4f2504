"""Batches for training, on the device the image set is on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch

from ..batch import Batch, CropFlip
from ..errors import InputError
from .sets import Images, ImageSet
from .stream import ResizedCropFlip, Streamed, evaluation_view

__all__ = ["Augment", "Loader"]

Augment = Literal["none", "crop-flip", "resized-crop-flip"]


class Loader:
    """Shuffled batches with their indices, augmented.

    augment, for images in memory: "crop-flip" pads by ``padding`` (4 for 32×32 images), crops and flips, and each batch
        has the ``view`` its images were seen in.
    augment, for streamed images: "resized-crop-flip" is torchvision's RandomResizedCrop(224) and a flip. ``view`` is
        None: what is remembered per example stays as it is and does not move with the crop, which is how ATAS treats
        ImageNet, resizing its perturbations only.
    augment="none" is what evaluation sees, for both.

    The order of an epoch and each example's crop depend on ``(seed, epoch)`` and its position in the set alone, so a
    resumed run sees what an unbroken one would have, whatever the number of workers. The global generators are not
    drawn from. Raises :class:`InputError` for an ``augment`` that the set does not have.
    """

    def __init__(
        self, images: ImageSet, batch_size: int, seed: int = 0, augment: Augment = "none", padding: int = 4
    ) -> None:
        if augment not in get_args(Augment):
            raise InputError(f"augment {augment!r} is not known; choose from {', '.join(get_args(Augment))}")
        streamed = isinstance(images, Streamed)
        has, has_not = ("resized-crop-flip", "crop-flip") if streamed else ("crop-flip", "resized-crop-flip")
        if augment == has_not:
            where = "streamed from files" if streamed else "in memory"
            raise InputError(f"augment {augment!r} is not for images {where}; choose {has!r} or 'none'")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.augment, self.padding = augment, padding

    def __len__(self) -> int:
        full, left = divmod(len(self.images), self.batch_size)
        return full + (left > 1 or (left == 1 and full == 0))  # a last one joins the batch before it

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch ``epoch``."""
        if isinstance(self.images, Streamed):
            return self._streamed(self.images, epoch)
        assert isinstance(self.images, Images)
        return self._in_memory(self.images, epoch)

    def _order(self, epoch: int, device: torch.device) -> tuple[list[torch.Tensor], torch.Generator]:
        """The positions of each batch, and the generator that shuffled them."""
        generator = torch.Generator(device).manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self.images), generator=generator, device=device)
        batches = list(order.split(self.batch_size))
        if self.batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
            # One example has no batch statistics: it joins the batch before it.
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches, generator

    def _in_memory(self, images: Images, epoch: int) -> Iterator[Batch]:
        batches, generator = self._order(epoch, images.device)
        for index in batches:
            x, view = images[index].pixels(), None
            if self.augment == "crop-flip":
                view = CropFlip.draw(len(index), self.padding, generator, images.device)
                x = view.apply(view.pad(x))
            yield Batch(x, images.y[index], index, view)

    def _streamed(self, images: Streamed, epoch: int) -> Iterator[Batch]:
        batches, _ = self._order(epoch, torch.device("cpu"))
        view = ResizedCropFlip(self.seed, epoch) if self.augment == "resized-crop-flip" else evaluation_view
        positions = [index.tolist() for index in batches]
        decoded = images.files(view).batches(positions, images.workers, pin=images.device.type == "cuda")
        for index, bytes_ in zip(batches, decoded, strict=True):
            index = index.to(images.device)
            x = bytes_.to(images.device, non_blocking=True).float() / 255
            yield Batch(x, images.y[index], index)
