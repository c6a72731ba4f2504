"""Batches of images in memory."""

from __future__ import annotations

import pytest
import torch
from data_files import (
    pictures,
)
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import functional as vision

from bilevel_at.batch import CropFlip
from bilevel_at.data import Images, Loader

pytestmark = pytest.mark.usefixtures("without_network")


def test_batches_in_memory_are_what_they_were():
    """The draws of an epoch, stated once more: a resumed run of an earlier version must see the same batches."""
    images = Images(torch.from_numpy(pictures(23)[0]).permute(0, 3, 1, 2).contiguous(), torch.arange(23) % 10, 10)
    generator = torch.Generator().manual_seed(1_000_003 * 7 + 2)
    order = torch.randperm(23, generator=generator)
    for batch, index in zip(Loader(images, 8, 7, "crop-flip").epoch(2), order.split(8), strict=True):
        offsets = torch.randint(0, 9, (2, len(index)), generator=generator)
        flip = torch.rand(len(index), generator=generator) < 0.5
        assert torch.equal(batch.index, index) and torch.equal(batch.y, images.y[index])
        padded = torch.nn.functional.pad(images.x[index].float() / 255, (4, 4, 4, 4))
        for i, (top, left) in enumerate(offsets.T.tolist()):
            x = padded[i, :, top : top + 32, left : left + 32]
            assert torch.equal(batch.x[i], x.flip(-1) if flip[i] else x)
        assert (batch.view.top.tolist(), batch.view.left.tolist()) == tuple(offsets.tolist())


def coloured(n, start=0):
    """Images of one pixel that say which one they are."""
    x = torch.arange(start, start + n, dtype=torch.uint8).reshape(n, 1, 1, 1)
    return Images(x, torch.arange(start, start + n) % 3, 3)


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9)),
    fraction=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    epoch=st.integers(0, 3),
)
def test_a_share_of_each_batch_is_extra(sizes, fraction, epoch):
    n, m, size = sizes
    own, extra = coloured(n), coloured(m, 100)
    plain, mixed = Loader(own, size, 3), Loader(own, size, 3, extra=extra, extra_fraction=fraction)
    seen = list(mixed.epoch(epoch))
    assert [len(batch) for batch in seen] == [len(batch) for batch in plain.epoch(epoch)]
    for batch in seen:
        assert (batch.index >= n).sum() == round(fraction * len(batch))
        shown = torch.where(batch.index < n, batch.index, batch.index - n + 100)
        assert torch.equal((255 * batch.x).round().long().flatten(), shown)
        assert torch.equal(batch.y, mixed.labels[batch.index])
    index = torch.cat([batch.index for batch in seen])
    used = index[index >= n].bincount(minlength=n + m)[n:]
    assert used.max() - used.min() <= 1  # none again before all were seen
    assert index[index < n].unique().numel() == (index < n).sum()
    again = torch.cat([batch.index for batch in mixed.epoch(epoch)])
    assert torch.equal(index, again)


def test_no_extra_images_change_nothing():
    own = coloured(23)
    for a, b in zip(Loader(own, 4, 1).epoch(2), Loader(own, 4, 1, extra_fraction=0.7).epoch(2), strict=True):
        assert torch.equal(a.index, b.index)


@given(
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_crop_and_flip_are_torchvision_s(shape, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    view = CropFlip.draw(len(x), padding, generator, x.device)
    height, width = shape[2:]
    expected = []
    for image, top, left, flip in zip(x, view.top.tolist(), view.left.tolist(), view.flip.tolist(), strict=True):
        window = vision.crop(vision.pad(image, [padding] * 4), top, left, height, width)
        expected.append(vision.hflip(window) if flip else window)
    seen = view.apply(view.pad(x))
    assert seen.dtype == torch.uint8 and torch.equal(seen, torch.stack(expected))
    assert torch.equal(view.apply(view.pad(x.float() / 255)), torch.stack(expected).float() / 255)
