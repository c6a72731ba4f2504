"""The public check: it leaves no trace, takes every upper loss, and does not pass over NaN."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import ATK, batch_of, dense, taylor

import bilevel_at as ba
from bilevel_at.solvers import HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck


def test_hypergradcheck_leaves_everything_as_it_was():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    batch = ba.Batch(batch.x, batch.y, torch.arange(4))
    lower = ba.Linearized(ATK, ba.LinfBall(0.2), "remembered", "taylor", ba.Adaptive(0.5, 1.0))
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    ZeroIG().backward(problem, model, batch)
    before = copy.deepcopy((model.state_dict(), problem.state_dict()))
    gradients = [p.grad.clone() for p in model.parameters()]

    class Fails(ba.UpperProblem):
        calls = 0

        def loss_at(self, model, batch, solution, generator=None):
            Fails.calls += 1
            if Fails.calls > 2:
                raise RuntimeError("in the middle")
            return super().loss_at(model, batch, solution, generator)

    with pytest.raises(RuntimeError, match="in the middle"):
        hypergradcheck(ba.BilevelProblem(Fails(), lower), HessianFreeKKT(), model, batch)
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch, eps=1e-5, rtol=1e-6)
    after = (model.state_dict(), problem.state_dict())
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert before[1].keys() == {"lower.anchor", "lower.step"}
    for part, state in before[1].items():
        assert torch.equal(state["values"], after[1][part]["values"])
        assert torch.equal(state["known"], after[1][part]["known"])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_hypergradcheck_takes_upper_losses_that_differentiate():
    """GradAlign's regulariser differentiates inside the upper loss."""

    class Penalty(ba.UpperProblem):
        def loss_at(self, model, batch, solution, generator=None):
            x = (batch.x + solution.delta).detach().requires_grad_()
            out = ba.cross_entropy(model, ba.Batch(x, batch.y), torch.zeros_like(x))
            (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            return super().loss_at(model, batch, solution, generator) + 0.1 * g.flatten(1).square().sum(1)

    problem = ba.BilevelProblem(Penalty(), ba.Linearized(ATK, ba.LinfBall(0.2), "zero", "sign", 0.1))
    assert hypergradcheck(problem, ZeroIG(), dense(6, 5, 3), batch_of(3, 6), eps=1e-5, rtol=1e-6)


def test_hypergradcheck_does_not_pass_over_nan():
    class Spoilt(ba.UpperProblem):
        def loss_at(self, model, batch, solution, generator=None):
            values = super().loss_at(model, batch, solution, generator)
            return values if torch.equal(model[1].weight, initial) else values * float("nan")

    model = dense(6, 5, 3)
    initial = model[1].weight.detach().clone()
    lower = ba.Linearized(ATK, ba.LinfBall(0.1), "zero", "sign", 0.1)
    with pytest.raises(AssertionError, match="numeric nan"):
        hypergradcheck(ba.BilevelProblem(Spoilt(), lower), ZeroIG(), model, batch_of(3, 6))
    with pytest.raises(ba.InputError, match=r"batch\.x is torch.float32"):
        hypergradcheck(taylor(), ZeroIG(), dense(6, 5, 3), ba.Batch(torch.rand(2, 6), torch.tensor([0, 1])))
