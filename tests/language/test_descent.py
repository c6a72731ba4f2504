"""A lower problem of two lines, solved by the base class."""

from __future__ import annotations

import pytest
from networks import Quadratic, batch_of, dense

import bilevel_at as ba
from bilevel_at.solvers import FullKKT
from bilevel_at.testing import hypergradcheck


def test_a_problem_of_two_lines_is_solved_and_differentiated():
    problem = ba.BilevelProblem(ba.UpperProblem(), Quadratic())
    for solver in (FullKKT(method="dense"), FullKKT(method="cg", tol=1e-12)):
        assert hypergradcheck(problem, solver, dense(6, 5, 3), batch_of(3, 6), eps=1e-5, rtol=1e-5)


def test_an_objective_that_is_not_a_number_is_named_at_once():
    class Broken(ba.LowerProblem):
        constraint = ba.LinfBall(0.1)

        def objective(self, model, batch, delta, anchor):
            return (delta.flatten(1).sum(1) - 1).sqrt() * (batch.y == 1) + delta.flatten(1).square().sum(1)

    with pytest.raises(ba.ConvergenceError, match="is not a number on sample"):
        Broken().solve(dense(6, 5, 3), batch_of(3, 6))
