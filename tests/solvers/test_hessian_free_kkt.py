"""HessianFreeKKT: what it refuses."""

from __future__ import annotations

import pytest
from networks import batch_of, dense

import bilevel_at as ba
from bilevel_at.solvers import HessianFreeKKT


def test_hessian_free_needs_a_curvature():
    problem = ba.BilevelProblem(ba.UpperProblem(), ba.Targeted(ba.LinfBall(0.1), steps=2))
    with pytest.raises(ba.CurvatureError, match=r"Targeted has no proximal term \(λ = 0\)"):
        HessianFreeKKT().hypergradient(problem, dense(6, 5, 3), batch_of(2, 6))
    HessianFreeKKT(damping=1.0).hypergradient(problem, dense(6, 5, 3), batch_of(2, 6))
