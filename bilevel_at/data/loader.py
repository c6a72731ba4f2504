"""Batches for training, on the device the image set is on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch

from ..batch import Batch, CropFlip
from ..draws import generator_on
from ..errors import InputError
from ..shares import Share, deal
from .sets import Images, ImageSet
from .stream import ResizedCropFlip, Streamed, evaluation_view

__all__ = ["Augment", "Loader"]

Augment = Literal["none", "crop-flip", "resized-crop-flip"]
"""Augmentation by name; :class:`~bilevel_at.runs.recipe.Recipe` says what each does."""
Dealing = Callable[[list[torch.Tensor]], Sequence[Share | None]]


class Loader:
    """Shuffled batches with their indices, augmented.

    augment, for images in memory: "crop-flip" pads by ``padding`` (4 for 32×32 images), crops and flips, and each batch
        has the ``view`` its images were seen in.
    augment, for streamed images: "resized-crop-flip" is torchvision's RandomResizedCrop(224) and a flip. ``view`` is
        None: what is remembered per example stays as it is and does not move with the crop, which is how ATAS treats
        ImageNet, resizing its perturbations only.
    augment="none" is what evaluation sees, for both.
    extra: more images of the same shape, for images in memory. ``extra_fraction`` of each batch is then drawn from
        them, without replacement until all were seen, and the rest from ``images``. An epoch has as many batches as
        without them, so it sees ``1 − extra_fraction`` of ``images``. Extra image i has index ``len(images) + i``.

    The order of an epoch and each example's crop depend on ``(seed, epoch)`` and its position in the set alone, so a
    resumed run sees what an unbroken one would have, whatever the number of workers. The global generators are not
    drawn from. Raises :class:`InputError` for an ``augment`` that the set does not have, and for extra images beside
    streamed ones.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int = 0,
        augment: Augment = "none",
        padding: int = 4,
        extra: Images | None = None,
        extra_fraction: float = 0.0,
    ) -> None:
        if augment not in get_args(Augment):
            raise InputError(f"augment {augment!r} is not known; choose from {', '.join(get_args(Augment))}")
        streamed = isinstance(images, Streamed)
        has, has_not = ("resized-crop-flip", "crop-flip") if streamed else ("crop-flip", "resized-crop-flip")
        if augment == has_not:
            where = "streamed from files" if streamed else "in memory"
            raise InputError(f"augment {augment!r} is not for images {where}; choose {has!r} or 'none'")
        if streamed and extra is not None:
            raise InputError("extra images are for images in memory; these are streamed from files")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.extra, self.extra_fraction = extra, extra_fraction
        self.augment, self.padding = augment, padding

    def __len__(self) -> int:
        full, left = divmod(len(self.images), self.batch_size)
        return full + (left > 1 or (left == 1 and full == 0))  # a last one joins the batch before it

    @property
    def smallest(self) -> int:
        """The size of the smallest batch."""
        full, left = divmod(len(self.images), self.batch_size)
        return left if full == 0 or left > 1 else self.batch_size

    @property
    def labels(self) -> torch.Tensor:
        """The label of every index, those of extra images at the end."""
        return self.images.y if self.extra is None else torch.cat([self.images.y, self.extra.y])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``epoch``, from batch ``start`` on; those before it are not decoded."""
        return (batch for batch, _ in self._batches(epoch, start, lambda batches: [None] * len(batches)))

    def dealt(self, epoch: int, start: int = 0, by_index: bool = False) -> Iterator[tuple[Batch, Share | None]]:
        """The same, and of several processes (:func:`~bilevel_at.shares.together`) this one's rows of each batch.

        Args:
            epoch, start: as for :meth:`epoch`.
            by_index: whether examples, rather than places in the batch, are dealt out
                (:class:`~bilevel_at.shares.Share`).
        """
        return self._batches(epoch, start, lambda batches: deal(batches, by_index))

    def _batches(self, epoch: int, start: int, dealing: Dealing) -> Iterator[tuple[Batch, Share | None]]:
        if isinstance(self.images, Streamed):
            return self._streamed(self.images, epoch, start, dealing)
        assert isinstance(self.images, Images)
        return self._in_memory(self.images, epoch, start, dealing)

    def _order(self, epoch: int, device: torch.device) -> tuple[list[torch.Tensor], torch.Generator]:
        """The positions of each batch, and the generator that shuffled them."""
        generator = generator_on(device, 1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self.images), generator=generator, device=device)
        batches = list(order.split(self.batch_size))
        if self.batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
            # One example has no batch statistics: it joins the batch before it.
            batches[-2:] = [torch.cat(batches[-2:])]
        if self.extra is not None:
            batches = self._mixed(batches, order, len(self.extra), generator)
        return batches, generator

    def _mixed(
        self, batches: list[torch.Tensor], own: torch.Tensor, extra: int, generator: torch.Generator
    ) -> list[torch.Tensor]:
        """Batches of the same sizes, of which a share is extra images."""
        extras = [round(self.extra_fraction * len(batch)) for batch in batches]
        kept = [len(batch) - more for batch, more in zip(batches, extras, strict=True)]
        rounds = -(-sum(extras) // extra)  # as many permutations as are needed
        drawn = [torch.randperm(extra, generator=generator, device=own.device) for _ in range(rounds)]
        more = torch.cat([own.new_empty(0), *drawn])[: sum(extras)] + len(own)
        pairs = zip(own[: sum(kept)].split(kept), more.split(extras), strict=True)
        return [torch.cat(pair) for pair in pairs]

    def _in_memory(
        self, images: Images, epoch: int, start: int, dealing: Dealing
    ) -> Iterator[tuple[Batch, Share | None]]:
        batches, generator = self._order(epoch, images.device)
        for number, (index, share) in enumerate(zip(batches, dealing(batches), strict=True)):
            view = None
            if self.augment == "crop-flip":
                view = CropFlip.draw(len(index), self.padding, generator, images.device)
            if number < start:
                continue  # its view is drawn all the same, for the views of those that follow
            if share is not None:
                share = share.to(images.device)
                index, view = index[share.rows], None if view is None else view[share.rows]
            x, y = self._examples(images, index)
            if view is not None:
                x = view.apply(view.pad(x))
            yield Batch(x, y, index, view, len(self.labels)), share

    def _examples(self, images: Images, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixels, labels) of these indices; own images come before extra ones in a batch."""
        if self.extra is None:
            part = images[index]
            return part.pixels(), part.y
        own = index < len(images)
        parts = images[index[own]], self.extra[index[~own] - len(images)]
        return torch.cat([part.pixels() for part in parts]), torch.cat([part.y for part in parts])

    def _streamed(
        self, images: Streamed, epoch: int, start: int, dealing: Dealing
    ) -> Iterator[tuple[Batch, Share | None]]:
        batches = self._order(epoch, torch.device("cpu"))[0][start:]
        parts = dealing(batches)
        batches = [index if part is None else index[part.rows] for index, part in zip(batches, parts, strict=True)]
        view = ResizedCropFlip(self.seed, epoch) if self.augment == "resized-crop-flip" else evaluation_view
        positions = [index.tolist() for index in batches]
        decoded = images.files(view).batches(positions, images.workers, pin=images.device.type == "cuda")
        for index, part, bytes_ in zip(batches, parts, decoded, strict=True):
            index = index.to(images.device)
            x = bytes_.to(images.device, non_blocking=True).float() / 255
            yield Batch(x, images.y[index], index, examples=len(images)), part and part.to(images.device)
