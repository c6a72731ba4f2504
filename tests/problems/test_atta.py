"""ATTA: remembered perturbations, through crop and flip, and at another size."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from networks import F64
from torch.nn import functional as F
from transcriptions import (
    assert_same,
    box,
    by_sample,
    ce,
    ce_gradient,
    clip,
    descend_on,
    library_step,
    play,
    seeded,
    sign_step,
    uniform_noise,
    visits,
)

import bilevel_at as ba
from bilevel_at.problems import atas, atta
from bilevel_at.testing import strategies as bst


@examples(0.3)
@given(v=visits(kinks=True), factor=st.floats(0.1, 2.0))
def test_atta(v, factor):
    """x^j = Π(x^{j−1} + α sign ∇ℓ), α constant (ATAS paper, equation 5)."""

    def update(memory, batch, epoch):
        delta = sign_step(v.twin, batch.x, batch.y, memory.start(batch), factor * v.epsilon, v.epsilon)
        memory.store(batch, delta)
        return delta

    play(v, atta.problem(v.epsilon, factor * v.epsilon), atta.solver(), update)


def crop(canvas, top, left, flip, side):
    """One image's window, cut and mirrored by plain slicing."""
    window = canvas[:, top : top + side, left : left + side]
    return window.flip(2) if flip else window


@pytest.mark.parametrize("file", [atta, atas])
@examples(0.3)
@given(v=visits(image=(1, 3, 3)), padding=st.integers(1, 2), draws=bst.seeds)
def test_perturbations_move_with_the_crop_and_flip(file, v, padding, draws):
    """ATTA's augmentation: the canvas is remembered, each visit sees and rewrites the window that its image does."""
    side, c, steps = 3, 0.7, {"shortest": v.epsilon / 2, "longest": 7 * v.epsilon / 4}
    problem = (
        atta.problem(v.epsilon, 0.4 * v.epsilon) if file is atta else atas.problem(v.epsilon, v.epsilon, c=c, **steps)
    )
    generator, mirror, crops = seeded(v.seed + 1), seeded(v.seed + 1), seeded(draws)
    canvases, squares = {}, torch.zeros(len(v.x), dtype=F64)
    for epoch, index in v.epochs(3):
        problem.set_epoch(epoch + 5, 30)  # past ATAS' warm-up
        view = ba.CropFlip.draw(len(index), padding, crops, torch.device("cpu"))
        batch = v.batch(index, view)
        step = library_step(problem, file.solver(), v.model, batch, v.lr, generator)
        wide = side + 2 * padding
        fresh = uniform_noise((len(index), 1, wide, wide), v.epsilon, mirror)
        places = list(zip(view.top.tolist(), view.left.tolist(), view.flip.tolist(), strict=True))
        images = F.pad(v.x[index], (padding,) * 4)
        x = torch.stack([crop(image, *place, side) for image, place in zip(images, places, strict=True)])
        assert torch.equal(batch.x, x)
        rows = []
        for k, i in enumerate(index.tolist()):
            canvases.setdefault(i, fresh[k].clone())
            rows.append(crop(canvases[i], *places[k], side))
        z = clip(torch.stack(rows), x, v.epsilon)
        gradient = ce_gradient(v.twin, x + z, batch.y)
        squares[index] = 0.5 * squares[index] + 0.5 * gradient.flatten(1).norm(dim=1) ** 2
        adaptive = (v.epsilon * c / (c + squares[index].sqrt())).clamp(v.epsilon / 2, 7 * v.epsilon / 4)
        alpha = torch.full((len(index),), 0.4 * v.epsilon, dtype=F64) if file is atta else adaptive
        delta = clip(z + by_sample(alpha, z) * gradient.sign(), x, v.epsilon)
        torch.testing.assert_close(step.solution.delta, delta, rtol=1e-9, atol=1e-12)
        for k, i in enumerate(index.tolist()):
            top, left, flip = places[k]
            canvases[i][:, top : top + side, left : left + side] = delta[k].flip(2) if flip else delta[k]
            torch.testing.assert_close(problem.lower.anchor.memory.values[i], canvases[i], rtol=1e-9, atol=1e-12)
        descend_on(v.twin, ce(v.twin, x + delta, batch.y).mean(), v.lr)
        assert_same(v.model, v.twin)


def resized(delta, side):
    return F.interpolate(delta, (side, side), mode="bilinear", align_corners=False, antialias=True)


@examples(0.3)
@given(v=visits(n=4, image=(1, 3, 3)), size=st.integers(1, 4), step=st.floats(0.1, 1.5))
def test_perturbations_kept_at_another_size(v, size, step):
    """Algorithm 2: δ resized to be used, and resized again to be stored; δ* itself is feasible."""
    problem = atta.problem(v.epsilon, step * v.epsilon, size=size)
    generator, mirror, small = seeded(v.seed + 1), seeded(v.seed + 1), {}
    for _, index in v.epochs(3):
        batch = v.batch(index)
        taken = library_step(problem, atta.solver(), v.model, batch, v.lr, generator)
        fresh = uniform_noise((len(index), 1, size, size), v.epsilon, mirror)
        stored = torch.stack([small.get(i, fresh[k]) for k, i in enumerate(index.tolist())])
        z = clip(resized(stored, 3), batch.x, v.epsilon)
        delta = sign_step(v.twin, batch.x, batch.y, z, step * v.epsilon, v.epsilon)
        ours = taken.solution.delta
        torch.testing.assert_close(ours, delta, rtol=1e-9, atol=1e-12)
        low, high = box(batch.x, v.epsilon)
        assert ((ours >= low) & (ours <= high)).all()
        for k, i in enumerate(index.tolist()):
            small[i] = resized(delta[k : k + 1], size)[0]
            value = problem.lower.anchor.memory.values[i]
            assert value.shape == (1, size, size) and value.abs().max() <= v.epsilon * (1 + 1e-12)
            torch.testing.assert_close(value, small[i], rtol=1e-9, atol=1e-12)
        descend_on(v.twin, ce(v.twin, batch.x + delta, batch.y).mean(), v.lr)
        assert_same(v.model, v.twin)
