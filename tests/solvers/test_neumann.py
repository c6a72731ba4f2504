"""Neumann: exactly what autograd gives through the last K projected gradient steps, and FullKKT in the limit."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import batch_of, dense, proximal, taylor, with_batch_norm
from own_constraints import slabs

import bilevel_at as ba
from bilevel_at.solvers import FullKKT, HessianFreeKKT, Neumann
from bilevel_at.testing import activity_margin
from bilevel_at.testing import strategies as bst

CONSTRAINTS = {
    "box": lambda shape: bst.boxes(),
    "l2": lambda shape: bst.l2_balls(),
    "own": slabs,
}


def unrolled(problem, model, batch, z, terms, alpha):
    """dF/dθ through ``terms`` steps δ ← P_C(δ − α∇g), from δ* as a constant."""
    lower = problem.lower
    delta = lower.solve(model, batch, z).delta
    for _ in range(terms):
        point = delta if delta.requires_grad else delta.clone().requires_grad_()
        (slope,) = torch.autograd.grad(lower.objective(model, batch, point, z).sum(), point, create_graph=True)
        delta = lower.constraint.project(point - alpha * slope, batch.x)
    loss = ba.cross_entropy(model, batch, delta).mean()
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("kind", CONSTRAINTS)
@pytest.mark.parametrize("terms", [1, 2, 5])
@examples(0.3)
@given(data=st.data())
def test_it_is_autograd_through_the_last_steps(kind, terms, data):
    s = data.draw(bst.settings_of(bst.proximal, CONSTRAINTS[kind], max_values=8))
    assume(activity_margin(s.problem, s.model, s.batch, s.anchor) > 1e-3)
    alpha = 0.7 / s.problem.lower.lam
    step = Neumann(terms, alpha).hypergradient(s.problem, s.model, s.batch, anchor=s.anchor)
    expected = unrolled(s.problem, s.model, s.batch, s.anchor, terms, alpha)
    scale = torch.stack([g.norm() for g in expected]).norm()
    for got, want in zip(step.grads.values(), expected, strict=True):
        assert (got - want).norm() <= 1e-12 * scale + 1e-15


@pytest.mark.parametrize("kind", [*CONSTRAINTS, "polyhedron"])
@examples(0.3)
@given(data=st.data())
def test_it_tends_to_full_kkt_geometrically(kind, data):
    constraint = bst.polyhedra if kind == "polyhedron" else CONSTRAINTS[kind]
    s = data.draw(bst.settings_of(bst.proximal, constraint, max_values=6, max_size=2))
    assume(activity_margin(s.problem, s.model, s.batch, s.anchor) > 1e-3)
    lower = s.problem.lower
    solution = lower.solve(s.model, s.batch, s.anchor, differentiable=True)
    v = torch.randn(solution.delta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limit = FullKKT(method="dense").adjoint(s.problem, s.model, solution, v)
    # λ is above the network's curvature bound L, so that H is between λ − L > 0 and 2λ
    bound = bst.curvature_bound(s.model)
    rate = 1 - (lower.lam - bound) / (2 * lower.lam)
    for terms in (1, 4, 16, 64):
        w = Neumann(terms, 1 / (2 * lower.lam)).adjoint(s.problem, s.model, solution, v)
        assert (w - limit).norm() <= rate**terms * limit.norm() * 1.001 + 1e-12
    if rate < 0.9:
        w = Neumann(400).adjoint(s.problem, s.model, solution, v)  # with the α that it measures itself
        assert (w - limit).norm() <= 1e-8 * limit.norm()


def test_one_term_is_exact_on_a_linearised_problem():
    model, batch = dense(6, 5, 3), batch_of(3, 6)
    for constraint in (ba.LinfBall(0.1), ba.L2Ball(0.1)):
        problem = taylor(step=0.5)
        problem.lower.constraint = constraint
        expected = HessianFreeKKT().hypergradient(problem, model, batch)
        assert expected.implicit_norm > 1e-4 * expected.direct_norm
        for solver in (Neumann(1), Neumann(terms=60, alpha=0.2), FullKKT()):
            got = solver.hypergradient(problem, model, batch)
            for name, g in expected.grads.items():
                torch.testing.assert_close(got.grads[name], g, rtol=1e-9, atol=1e-13)


def test_coupled_samples_share_one_norm():
    """In train mode the batch is one system; the series with the α measured on it tends to its solution."""
    model, batch, problem = with_batch_norm().train(), batch_of(6, 6), proximal(lam=200.0, mode="train")
    z = torch.zeros_like(batch.x)
    expected = FullKKT(method="cg", tol=1e-13).hypergradient(problem, model, batch, anchor=z)
    got = Neumann(200).hypergradient(problem, model, batch, anchor=z)
    for name, g in expected.grads.items():
        torch.testing.assert_close(got.grads[name], g, rtol=1e-8, atol=1e-12)


def test_one_step_differentiation_takes_no_hessian(monkeypatch):
    def never(*args):
        raise AssertionError("the first term has no Hessian in it")

    monkeypatch.setattr("bilevel_at.solvers.neumann.CurvatureOperator", never)
    assert Neumann(1, 0.05).hypergradient(proximal(), dense(6, 5, 3), batch_of(2, 6)).implicit_norm > 0


def test_refusals():
    for terms in (0, -1, 2.5):
        with pytest.raises(ba.InputError, match=f"terms is {terms}; it must be a whole number, at least 1"):
            Neumann(terms)
    with pytest.raises(ba.InputError, match="alpha is -1; it must be a positive finite number"):
        Neumann(1, -1.0)
    problem = ba.BilevelProblem(ba.UpperProblem(), ba.AtAnchor(ba.LinfBall(0.1)))
    assert Neumann(2).hypergradient(problem, dense(6, 5, 3), batch_of(2, 6)).implicit_norm == 0
