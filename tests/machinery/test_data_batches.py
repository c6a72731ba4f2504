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
