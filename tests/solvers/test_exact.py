"""Which solver is exact is read off the problem; the one that is named passes the check by differences."""

from __future__ import annotations

import pytest
import torch
from networks import ATK, F64, batch_of, dense
from own_constraints import Slab

import bilevel_at as ba
from bilevel_at.problems import beta, fastat, ssat, standard, yopo
from bilevel_at.solvers import SOLVERS, HessianFreeKKT, Lazy, ZeroIG
from bilevel_at.solvers.exact import exact_solver
from bilevel_at.testing import hypergradcheck


class Projected(ba.Constraint):
    """The ball of radius 0.2 by its projection alone."""

    def project(self, delta, x):
        return ba.L2Ball(0.2).project(delta, x)


class OfOne(ba.LowerProblem):
    """A g of one's own."""

    constraint = ba.LinfBall(0.2, bounds=None)

    def objective(self, model, batch, delta, anchor):
        return 5 * delta.flatten(1).square().sum(1) - model(batch.x + delta).tanh().square().sum(1)


def taylor(constraint):
    return ba.Linearized(ATK, constraint, "zero", "taylor", 0.5)


PROBLEMS = {
    "a sign": (ba.Linearized(ATK, ba.LinfBall(0.2), "zero", "sign", 0.1), "ZeroIG"),
    "no step": (ba.AtAnchor(ba.LinfBall(0.2)), "ZeroIG"),
    "linearised, in a box": (taylor(ba.LinfBall(0.2)), "HessianFreeKKT"),
    "linearised, in an l2 ball": (taylor(ba.L2Ball(0.2)), "HessianFreeKKT"),
    "linearised, and normalised": (
        ba.Linearized(ATK, ba.LinfBall(0.2), "zero", "normalized", 0.1),
        "HessianFreeKKT",
    ),
    "linearised, in a set that only projects": (taylor(Projected()), "ProjectionAdjoint"),
    "proximal": (ba.Proximal(ATK, ba.LinfBall(0.2), 8.0, "zero"), "FullKKT"),
    "a g of one's own": (OfOne(), "FullKKT"),
}

NAMES = {kind.__name__: name for name, kind in SOLVERS.items()}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_named_solver_is_exact(name):
    lower, expected = PROBLEMS[name]
    problem, model, batch = ba.BilevelProblem(ba.UpperProblem(), lower), dense(4, 6, 3), batch_of(5, 4)
    exact = exact_solver(problem, model, batch[:2])
    assert exact.solver == expected
    solver = SOLVERS[NAMES[exact.solver]]()
    assert exact.of(solver) == ""
    assert hypergradcheck(problem, solver, model, batch)


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (ssat.problem(0.2), "δ* has no derivative in θ; ZeroIG"),
        (beta.problem(0.2), "its steps stop short of a minimiser"),
        (
            ba.BilevelProblem(ba.UpperProblem(), ba.Proximal(ATK, Projected(), 8.0, "zero")),
            "the constraint has no active set, which FullKKT needs",
        ),
    ],
)
def test_where_none_is_exact(problem, why):
    exact = exact_solver(problem, dense(4, 6, 3), batch_of(5, 4), torch.Generator().manual_seed(0))
    assert exact.solver == "" and why in exact.why and exact.of(ZeroIG()) == ""


def test_what_keeps_a_solver_from_it():
    problem, model, batch = ba.BilevelProblem(ba.UpperProblem(), taylor(Slab(0.2))), dense(4, 6, 3), batch_of(5, 4)
    exact = exact_solver(problem, model, batch)
    assert exact.of(ZeroIG()) == "ZeroIG leaves the implicit term out"
    changed = HessianFreeKKT(ig_weight=0.5, cross_at="solution")
    assert exact.of(changed) == "HessianFreeKKT has ig_weight = 0.5, cross_at = solution"
    assert exact.of(Lazy(HessianFreeKKT(), 0.5)) == "Lazy has the implicit term now and then, exact on average"
    assert exact.of(Lazy(HessianFreeKKT(ig_weight=0.5), 0.5)).startswith("Lazy has ig_weight = 0.5, the implicit term")
    assert exact.of(yopo.solver()) == "YOPO has a hypergradient of its own"
    any_is = exact_solver(fastat.problem(0.2), model, batch, torch.Generator().manual_seed(0))
    assert any_is.of(changed) == "" and batch.x.dtype == F64
    assert "does not depend on θ" in exact_solver(standard.problem(0.2), model, batch).why
