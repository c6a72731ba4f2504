"""Anchors: corners, what is remembered, and when it is drawn again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import F64, Quadratic, batch_of, dense, small, views
from transcriptions import seeded

import bilevel_at as ba
from bilevel_at.problems import atas, fgsm
from bilevel_at.solvers import ZeroIG


def test_a_named_policy_on_the_class_keeps_its_state():
    class Remembering(Quadratic):
        anchor = "remembered"

    one, two = (ba.BilevelProblem(ba.UpperProblem(), Remembering()) for _ in range(2))
    batch = batch_of(3, 6).replace(index=torch.arange(3))
    delta = ZeroIG().backward(one, dense(6, 5, 3), batch).solution.delta
    assert not torch.equal(two.lower.solve(dense(6, 5, 3), batch).anchor, delta)  # each object has its own
    two.load_state_dict(one.state_dict())
    for problem in (one, two):
        assert torch.equal(problem.lower.solve(dense(6, 5, 3), batch).anchor, delta)
    one.lower.anchor = ba.Zero()  # and may be changed afterwards
    assert (one.lower.solve(dense(6, 5, 3), batch).anchor == 0).all()


def test_random_corners_are_fair():
    x = torch.full((1, 4000), 0.5, dtype=F64)
    model = torch.nn.Linear(4000, 2).double()
    lower = fgsm.problem(0.1, "corner").lower
    z = lower.solve(model, ba.Batch(x, torch.tensor([0])), generator=seeded(3)).anchor
    assert abs((z > 0).double().mean().item() - 0.5) < 0.04  # five standard deviations


@given(data=st.data(), n=st.integers(1, 3), padding=st.integers(0, 3))
def test_perturbations_follow_their_image_exactly(data, n, padding):
    """Image and perturbation go through the same views: x + δ of a second view is that view of the first x + δ."""
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.3, bounds=None), ba.Remembered(), "sign", step=0.1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    images = torch.rand(n, 1, 4, 4)
    index, y = torch.arange(n), torch.zeros(n).long()
    first, second = data.draw(views(n, padding)), data.draw(views(n, padding))
    batch = ba.Batch(first.apply(first.pad(images)), y, index, first)
    delta = ZeroIG().backward(ba.BilevelProblem(ba.UpperProblem(), lower), model, batch).solution.delta
    assert torch.equal(lower.solve(model, batch).anchor, delta)
    canvas = lower.anchor.memory.values[index]
    again = ba.Batch(second.apply(second.pad(images)), y, index, second)
    assert torch.equal(lower.solve(model, again).anchor, second.apply(canvas))
    assert torch.equal(first.apply(canvas), delta)


def test_perturbations_are_redrawn_on_schedule():
    model, batch = small()
    problem = atas.problem(epsilon=0.1, reset_every=3)
    ZeroIG().backward(problem, model, batch)
    emptied = []
    for epoch in range(10):
        problem.lower.anchor.memory.known = torch.ones(8, dtype=torch.bool)
        problem.set_epoch(epoch, 10)
        emptied.append(problem.lower.anchor.memory.known is None)
    assert [e for e, gone in enumerate(emptied) if gone] == [2, 5, 8]  # as the third, sixth and ninth of ten begin


@pytest.mark.parametrize(("epochs", "expected"), [(9, [2, 5]), (10, [2, 5, 8]), (3, [])])
def test_nothing_is_redrawn_in_the_last_epoch(epochs, expected):
    """A network that trains for one more epoch on fresh perturbations would end on weak ones (ATAS' published code)."""
    anchor = ba.Remembered(reset_every=3)
    batch = batch_of(4, 6)
    batch = ba.Batch(batch.x, batch.y, torch.arange(4))
    cleared = []
    for epoch in range(epochs):
        anchor.memory.write(batch, batch.x)
        anchor.set_epoch(epoch, epochs)
        if torch.equal(anchor.memory.read(batch, torch.zeros_like(batch.x)), torch.zeros_like(batch.x)):
            cleared.append(epoch)
    assert cleared == expected
