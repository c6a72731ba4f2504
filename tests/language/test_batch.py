"""Batches: what they refuse; views write where they read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import F64, SOLVERS, batch_of, dense, taylor, views

import bilevel_at as ba
from bilevel_at.solvers import ZeroIG


def test_wrong_shapes_and_labels_are_named():
    model = dense(6, 5, 3)
    with pytest.raises(ba.InputError, match="label 3 is out of range: the model has 3 outputs"):
        ZeroIG().hypergradient(taylor(), model, ba.Batch(torch.rand(2, 6, dtype=F64), torch.tensor([0, 3])))
    with pytest.raises(ba.InputError, match="label -1 is out of range"):
        ZeroIG().hypergradient(taylor(), model, ba.Batch(torch.rand(2, 6, dtype=F64), torch.tensor([0, -1])))
    with pytest.raises(ba.InputError, match=r"y has shape \(3,\); 2 inputs need \[2, ...\]"):
        ba.Batch(torch.rand(2, 6), torch.zeros(3).long())
    with pytest.raises(ba.InputError, match=r"takes inputs in \[0, 1\]"):
        ZeroIG().hypergradient(taylor(), model, ba.Batch(torch.rand(2, 6, dtype=F64) * 255, torch.zeros(2).long()))
    with pytest.raises(ba.InputError, match=r"y is torch.float64 of shape \(2,\); class labels are int64"):
        ZeroIG().hypergradient(taylor(), model, ba.Batch(torch.rand(2, 6, dtype=F64), torch.zeros(2, dtype=F64)))
    with pytest.raises(ba.InputError, match="takes inputs in"):
        ZeroIG().hypergradient(
            taylor(), model, ba.Batch(torch.full((2, 6), float("nan"), dtype=F64), torch.zeros(2).long())
        )

    class Few(ba.UpperProblem):
        def loss_at(self, model, batch, solution, generator=None):
            return super().loss_at(model, batch, solution, generator)[:-1]

    with pytest.raises(ba.InputError, match=r"shape \(3,\); it must be one value per sample, \[4\], or one number"):
        ZeroIG().hypergradient(ba.BilevelProblem(Few(), taylor().lower), model, batch_of(4, 6))


def test_an_upper_loss_may_be_one_number():
    """Where the batch is coupled; as the mean of the losses it gives the same gradients."""

    class Mean(ba.UpperProblem):
        def loss_at(self, model, batch, solution, generator=None):
            return super().loss_at(model, batch, solution, generator).mean()

    for solver in SOLVERS:
        one, each = (
            solver.hypergradient(ba.BilevelProblem(upper, taylor(step=0.005).lower), dense(6, 5, 3), batch_of(4, 6))
            for upper in (Mean(), ba.UpperProblem())
        )
        assert one.losses.shape == () and torch.equal(one.loss, each.loss)
        for name, gradient in each.grads.items():
            torch.testing.assert_close(one.grads[name], gradient, rtol=1e-12, atol=1e-14)


@given(data=st.data(), n=st.integers(1, 4), padding=st.integers(0, 3), h=st.integers(1, 5), w=st.integers(1, 5))
def test_views_read_what_they_wrote(data, n, padding, h, w):
    canvas = torch.randn(n, 2, h + 2 * padding, w + 2 * padding)
    window = torch.randn(n, 2, h, w)
    view = data.draw(views(n, padding))
    written = view.write(canvas, window)
    assert torch.equal(view.apply(written), window)
    for i in range(n):  # and nothing outside the window moved
        top, left = view.top[i], view.left[i]
        outside = torch.ones_like(canvas[i], dtype=torch.bool)
        outside[:, top : top + h, left : left + w] = False
        assert torch.equal(written[i][outside], canvas[i][outside])
        expected = canvas[i, :, top : top + h, left : left + w]
        assert torch.equal(view.apply(canvas)[i], expected.flip(-1) if view.flip[i] else expected)
