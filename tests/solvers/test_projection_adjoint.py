"""ProjectionAdjoint: HessianFreeKKT's adjoint where there is an active set, and exact where there is none."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import ATK, F64, batch_of, dense, taylor
from own_constraints import Cylinder, cylinders, slabs

import bilevel_at as ba
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ProjectionAdjoint
from bilevel_at.testing import activity_margin, hypergradcheck
from bilevel_at.testing import strategies as bst

CONSTRAINTS = {
    "box": lambda shape: bst.boxes(),
    "l2": lambda shape: bst.l2_balls(),
    "polyhedron": bst.polyhedra,
    "own": slabs,
}


@pytest.mark.parametrize("kind", CONSTRAINTS)
@pytest.mark.parametrize("damping", [0.0, 3.0])
@examples(0.5)
@given(data=st.data())
def test_it_is_hessian_free_kkt_where_that_has_an_active_set(kind, damping, data):
    s = data.draw(bst.settings_of(bst.linearized, CONSTRAINTS[kind], max_values=8))
    assume(activity_margin(s.problem, s.model, s.batch, s.anchor) > 1e-3)
    lower = s.problem.lower
    solution = lower.solve(s.model, s.batch, s.anchor, differentiable=True)
    v = torch.randn(solution.delta.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    v[0] *= 1e-12  # confident samples have tiny gradients
    expected = HessianFreeKKT(damping=damping).adjoint(s.problem, s.model, solution, v)
    got = ProjectionAdjoint(damping=damping).adjoint(s.problem, s.model, solution, v)
    for w, want, each in zip(got, expected, v, strict=True):
        assert (w - want).norm() <= 1e-8 * each.norm() / (solution.lam + damping)


def from_zero(constraint, model):
    """Its anchor draws nothing, which takes a ``sample``."""
    return st.floats(0.05, 2.0).map(lambda step: ba.Linearized(ATK, constraint, "zero", "taylor", step))


@examples(0.5)
@given(s=bst.settings_of(from_zero, cylinders, max_values=8))
def test_it_is_exact_on_a_set_that_can_only_be_projected_onto(s):
    solver = ProjectionAdjoint()
    step = solver.hypergradient(s.problem, s.model, s.batch, anchor=s.anchor)
    solution = s.problem.lower.solve(s.model, s.batch, s.anchor, differentiable=True)
    u = solution.delta - solution.gradient.detach() / solution.lam
    assume(s.problem.lower.constraint.margin(u) > 1e-3)
    assume(step.implicit_norm > 1e-4 * step.direct_norm)
    assert hypergradcheck(s.problem, solver, s.model, s.batch, eps=1e-5, rtol=1e-6, anchor=s.anchor)


@pytest.mark.parametrize("solver", [HessianFreeKKT(), FullKKT()])
def test_kkt_solvers_name_it_where_there_is_no_active_set(solver):
    lower = ba.Linearized(ATK, Cylinder(0.1), "zero", "taylor", 0.5)
    with pytest.raises(ba.InputError, match="Cylinder does not define active.*ProjectionAdjoint needs project alone"):
        solver.hypergradient(ba.BilevelProblem(ba.UpperProblem(), lower), dense(6, 5, 3), batch_of(2, 6))


def test_a_kink_within_the_difference_is_stepped_around():
    """One coordinate is 1e-6 from its bound: closer than the first difference reaches, not than the last."""

    class Pull(ba.LowerProblem):
        constraint = ba.LinfBall(0.25, bounds=None)

    delta = torch.tensor([[0.25 - 1e-6, 0.1, 0.25]], dtype=F64)
    gradient = torch.tensor([[0.0, 0.0, -0.3]], dtype=F64)
    solution = ba.Solution(delta, torch.zeros_like(delta), ba.Batch(torch.zeros_like(delta)), 1.0, gradient)
    problem = ba.BilevelProblem(ba.UpperProblem(), Pull())
    v = torch.tensor([[2.0, 0.1, 3.0]], dtype=F64)
    w = ProjectionAdjoint().adjoint(problem, dense(3, 3), solution, v)
    torch.testing.assert_close(w, torch.tensor([[2.0, 0.1, 0.0]], dtype=F64), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
def test_lower_precisions(dtype, tol):
    model, batch = dense(64, 16, 3), batch_of(4, 64)
    problem = taylor(epsilon=0.03, step=0.5)
    step = HessianFreeKKT().hypergradient(problem, model, batch)
    solution = problem.lower.solve(model, batch, torch.zeros_like(batch.x), differentiable=True)
    expected = HessianFreeKKT().adjoint(problem, model, solution, step.v)
    rounded = ba.Solution(
        solution.delta.to(dtype), solution.anchor, ba.Batch(batch.x.to(dtype)), 2.0, solution.gradient.to(dtype)
    )
    got = ProjectionAdjoint().adjoint(problem, model, rounded, step.v.to(dtype))
    assert got.dtype == dtype
    assert (got.double() - expected).norm() <= tol * expected.norm()


def test_a_direction_of_zero_and_no_curvature():
    problem = taylor()
    solution = problem.lower.solve(dense(6, 5, 3), batch_of(2, 6), differentiable=True)
    w = ProjectionAdjoint().adjoint(problem, dense(6, 5, 3), solution, torch.zeros(2, 6, dtype=F64))
    assert (w == 0).all()
    with pytest.raises(ba.CurvatureError, match=r"no proximal term \(λ = 0\).*give ProjectionAdjoint a damping"):
        problem = ba.BilevelProblem(ba.UpperProblem(), ba.Targeted(ba.LinfBall(0.1), steps=2))
        ProjectionAdjoint().hypergradient(problem, dense(6, 5, 3), batch_of(2, 6))
