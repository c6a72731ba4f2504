"""Methods that other groups published, written with the public API alone: the seams of the language hold.

Each is compared with a plain loop over the authors' formulas, in float64, weights and running statistics after several
updates. None of them needs anything of the core that another one does not.
"""

from __future__ import annotations

import pytest
import torch
from plain_loops import EPS, batches, grad, in_ball, network
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.problems.fgsm_pgi import Tied
from bilevel_at.problems.ssat import Shortened
from bilevel_at.solvers import HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck

# Starts that are not clipped, outputs that are shared, and solutions that have no derivative.


@pytest.mark.parametrize("start", [ba.Uniform(3 * EPS, clip=False), ba.Corner(3 * EPS, clip=False)])
def test_starts_that_are_not_clipped_leave_the_range(start):
    model, batch = network(), next(batches(1))
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(EPS), start, "sign", EPS, "eval")
    solution = lower.solve(model, batch, generator=torch.Generator().manual_seed(7))
    z = solution.anchor
    assert z.abs().max() > 2 * EPS
    assert ((batch.x + z < 0) | (batch.x + z > 1)).any()
    model.eval()
    at = z.clone().requires_grad_()
    slope = grad(F.cross_entropy(model(batch.x + at), batch.y, reduction="sum"), at)
    torch.testing.assert_close(solution.delta, in_ball(z + EPS * slope.sign(), batch.x))


SMOOTHED = ba.CrossEntropy(0.4, over="others")


def test_a_kkt_solver_refuses_a_solution_without_a_derivative():
    model, batch = network(), next(batches(1))
    lower = Shortened(ba.minus(ba.cross_entropy), ba.LinfBall(EPS), "uniform", "taylor", EPS)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    assert ZeroIG().hypergradient(problem, model, batch).loss > 0
    with pytest.raises(ba.InputError, match="Shortened finds a δ\\* without a derivative"):
        HessianFreeKKT().hypergradient(problem, model, batch)


def test_reading_an_output_that_was_not_kept_is_an_error():
    lower = ba.Linearized(ba.minus(SMOOTHED), ba.LinfBall(EPS), "uniform", "sign", EPS)
    with pytest.raises(ba.InputError, match="keep_output=True"):
        ZeroIG().hypergradient(ba.BilevelProblem(Tied(SMOOTHED, 10), lower), network(), next(batches(1)))


def test_a_kept_output_and_an_implicit_term_go_together():
    model, batch = network().eval(), next(batches(1))
    model[4].weight.data *= 20
    ball = ba.LinfBall(0.4, None)
    lower = ba.Linearized(ba.minus(SMOOTHED), ball, "zero", "taylor", 0.3, keep_output=True)
    problem = ba.BilevelProblem(Tied(SMOOTHED, 10), lower)
    assert HessianFreeKKT().hypergradient(problem, model, batch).implicit_norm > 1e-3
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch, rtol=1e-6)
