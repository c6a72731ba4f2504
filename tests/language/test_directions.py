"""Directions: what they make of a gradient, and of its graph."""

from __future__ import annotations

import pytest
import torch
from networks import ATK, F64, batch_of, dense

import bilevel_at as ba
from bilevel_at.directions import direction_of
from bilevel_at.solvers import HessianFreeKKT
from bilevel_at.testing import hypergradcheck


def test_values():
    gradient = torch.tensor([[[3.0, -4.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=F64)
    sign = torch.tensor([[[1.0, -1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=F64)
    assert torch.equal(direction_of("sign")(gradient), sign)
    assert torch.equal(direction_of("taylor")(gradient), gradient)
    assert torch.equal(direction_of("normalized")(gradient), gradient / 5)  # and 0 stays 0, sample by sample


@pytest.mark.parametrize("name", ["sign", "taylor", "normalized"])
def test_they_go_through_autograd_as_they_say(name):
    gradient = torch.randn(3, 2, 2, dtype=F64).requires_grad_()
    direction = direction_of(name)
    out = direction(gradient)
    assert out.requires_grad is not direction.piecewise_constant and out.shape == gradient.shape
    assert direction.piecewise_constant == (name == "sign")
    if out.requires_grad:
        assert torch.autograd.gradcheck(direction, (gradient,))


def test_normalized_steps_are_as_long_as_the_step():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    delta = ba.Linearized(ATK, ba.Range(None), "zero", "normalized", 0.3).solve(model, batch).delta
    torch.testing.assert_close(delta.norm(dim=1), torch.full((4,), 0.3, dtype=F64))


def test_names_and_objects():
    own = ba.Direction("cubed", lambda gradient: gradient**3)
    assert direction_of(own) is own and direction_of("sign") is direction_of("sign")
    with pytest.raises(ba.InputError, match="direction 'up' is not known; choose from sign, taylor, normalized, or"):
        direction_of("up")


def test_a_direction_of_ones_own_has_an_exact_hypergradient():
    own = ba.Direction("softened", lambda gradient: torch.tanh(5 * gradient))
    lower = ba.Linearized(ATK, ba.LinfBall(0.3), "zero", own, 0.1)
    problem, model, batch = ba.BilevelProblem(ba.UpperProblem(), lower), dense(6, 5, 3), batch_of(4, 6)
    assert HessianFreeKKT().hypergradient(problem, model, batch).implicit_norm > 1e-3
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch, eps=1e-5, rtol=1e-6)
