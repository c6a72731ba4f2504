"""GaussNewtonKKT: FullKKT with the attack's curvature on ReLU networks, and an exact least eigenvalue."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from networks import ATK, F64, batch_of, dense, taylor, with_batch_norm
from own_constraints import slabs
from torch import nn

import bilevel_at as ba
from bilevel_at.solvers import FullKKT, GaussNewtonKKT, HessianFreeKKT
from bilevel_at.solvers.linear import dense_hessian
from bilevel_at.testing import strategies as bst

CONSTRAINTS = {
    "box": lambda shape: bst.boxes(),
    "l2": lambda shape: bst.l2_balls(),
    "polyhedron": bst.polyhedra,
    "own": slabs,
}


@st.composite
def relu_settings(draw, constraint, loss=ATK):
    d, classes = draw(st.integers(2, 7)), draw(st.integers(2, 4))
    torch.manual_seed(draw(bst.seeds))
    model = nn.Sequential(nn.Linear(d, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, classes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    batch = draw(bst.batches((d,), classes))
    step = draw(st.floats(0.05, 0.5))
    lower = ba.Linearized(loss, draw(constraint((d,))), "zero", "taylor", step)
    return ba.BilevelProblem(ba.UpperProblem(), lower), model, batch


def matrices(problem, model, solution):
    """T(∇²ℓ_atk + (λ + μ)I)T and T, dense, by torch.func."""
    active = problem.lower.constraint.active(solution.delta, solution.batch.x, solution.gradient.detach())
    hessian = dense_hessian(lambda batch, delta, z: problem.lower.attack_loss(model, batch, delta), solution)
    mu = 0 if active.curvature is None else active.curvature
    free = active.projector(F64)
    eye = torch.eye(hessian.shape[-1], dtype=F64)
    return free @ (
        hessian + (solution.lam + mu + torch.zeros(len(hessian), dtype=F64))[:, None, None] * eye
    ) @ free, free


@pytest.mark.parametrize("kind", CONSTRAINTS)
@pytest.mark.parametrize(
    "loss", [ATK, ba.CrossEntropy(0.3), ba.minus(ba.minus(ba.minus(ba.CrossEntropy(0.2))))], ids=repr
)
@examples(0.3)
@given(data=st.data())
def test_it_is_dense_full_kkt_on_relu_networks_and_knows_the_least_eigenvalue(kind, loss, data):
    problem, model, batch = data.draw(relu_settings(CONSTRAINTS[kind], loss))
    solution = problem.lower.solve(model, batch, differentiable=True)
    solver = GaussNewtonKKT()
    matrix, free = matrices(problem, model, solution)
    least = solver.smallest_eigenvalue(problem, model, solution)
    for i in range(len(batch)):
        values, vectors = torch.linalg.eigh(free[i])
        basis = vectors[:, values > 0.5]
        if basis.shape[1] == 0:
            assert least[i] == torch.inf
        else:
            expected = torch.linalg.eigvalsh(basis.T @ matrix[i] @ basis)[0]
            torch.testing.assert_close(least[i], expected, rtol=1e-8, atol=1e-8)
    v = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    full = FullKKT(method="dense", curvature="attack")
    bad = (least <= 0).nonzero().flatten().tolist()
    if bad:
        with pytest.raises(ba.CurvatureError) as theirs:
            full.adjoint(problem, model, solution, v)
        with pytest.raises(ba.CurvatureError, match="not positive definite.*its least eigenvalue is -") as ours:
            solver.adjoint(problem, model, solution, v)
        assert ours.value.samples == theirs.value.samples == tuple(bad)
    damping = max(0.0, 0.5 - least.min().item())
    w = GaussNewtonKKT(damping=damping).adjoint(problem, model, solution, v)
    expected = FullKKT(method="dense", curvature="attack", damping=damping).adjoint(problem, model, solution, v)
    torch.testing.assert_close(w, expected, rtol=1e-8, atol=1e-8 * v.norm().item())


@examples(0.5)
@given(data=st.data())
def test_auto_damps_those_samples_that_need_it_and_no_more(data):
    problem, model, batch = data.draw(relu_settings(CONSTRAINTS["box"]))
    solution = problem.lower.solve(model, batch, differentiable=True)
    v = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    auto = GaussNewtonKKT(damping="auto", margin=0.2)
    least = auto.smallest_eigenvalue(problem, model, solution)
    w = auto.adjoint(problem, model, solution, v)
    lam = solution.lam
    for i in range(len(batch)):
        # −‖JᵀSJ‖ + λ is the least eigenvalue
        norm = lam - least[i].item() if least[i] < torch.inf else 0.0
        damping = max(0.0, 0.2 * max(lam, norm) - least[i].item())
        each = slice(i, i + 1)
        one = problem.lower.solve(model, batch[each], differentiable=True)
        expected = GaussNewtonKKT(damping=damping).adjoint(problem, model, one, v[each])
        torch.testing.assert_close(w[each], expected, rtol=1e-9, atol=1e-12)


def test_where_nothing_needs_it_auto_is_undamped():
    torch.manual_seed(0)
    model, batch = dense(6, 8, 3, activation=nn.ReLU), batch_of(3, 6)
    problem = taylor(step=0.02)
    plain = GaussNewtonKKT().hypergradient(problem, model, batch)
    full = FullKKT(method="dense", curvature="attack").hypergradient(problem, model, batch)
    free = HessianFreeKKT().hypergradient(problem, model, batch)
    auto = GaussNewtonKKT(damping="auto").hypergradient(problem, model, batch)
    assert plain.implicit_norm > 0
    for name, g in plain.grads.items():
        assert torch.equal(auto.grads[name], g)
        torch.testing.assert_close(full.grads[name], g, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(free.grads[n], g, rtol=1e-4) for n, g in plain.grads.items())


def test_smooth_networks_have_another_hessian():
    """Elsewhere it leaves out Σ_k (p − t)_k ∇² logit_k, and does not say so."""
    model, batch, problem = dense(6, 8, 3), batch_of(3, 6), taylor(step=0.1)
    a = GaussNewtonKKT().hypergradient(problem, model, batch)
    b = FullKKT(method="dense", curvature="attack").hypergradient(problem, model, batch)
    assert any(not torch.allclose(a.grads[n], b.grads[n], rtol=1e-6) for n in a.grads)


@pytest.mark.parametrize(
    ("loss", "shown"), [(ba.minus(ba.negative_margin), r"minus\(negative_margin\)"), (lambda *a: ATK(*a), "<lambda>")]
)
def test_only_the_cross_entropy(loss, shown):
    lower = ba.Linearized(loss, ba.LinfBall(0.1), "zero", "taylor", 0.1)
    with pytest.raises(ba.InputError, match=f"needs an attack loss that is plus or minus ba.CrossEntropy.*{shown}"):
        GaussNewtonKKT().hypergradient(ba.BilevelProblem(ba.UpperProblem(), lower), dense(6, 5, 3), batch_of(2, 6))


def test_samples_that_share_something_are_refused():
    with pytest.raises(ba.InputError, match="GaussNewtonKKT needs samples that share nothing"):
        GaussNewtonKKT().hypergradient(taylor(step=0.01, mode="train"), with_batch_norm().train(), batch_of(6, 6))
    GaussNewtonKKT().hypergradient(taylor(step=0.01), with_batch_norm().train(), batch_of(6, 6))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"damping": -1.0}, "damping is -1"),
        ({"damping": "most"}, "damping is 'most'"),
        ({"margin": 0.0}, "margin is 0; it must be above 0 and at most 1"),
        ({"cross_at": "here"}, "cross_at is 'here'"),
    ],
)
def test_bad_arguments(wrong, line):
    with pytest.raises(ba.InputError, match=line):
        GaussNewtonKKT(**wrong)


class Pushed(ba.LowerProblem):
    """The attack loss alone, which FullKKT's Hessian is of too: λ is 0."""

    anchor = "zero"

    def __init__(self, loss, radius):
        self.attack_loss, self.constraint = loss, ba.LinfBall(radius, None)

    def objective(self, model, batch, delta, anchor):
        return self.attack_loss(model, batch, delta)


@pytest.mark.parametrize("damping", [0.0, "auto"])
def test_without_a_proximal_term_where_the_hessian_alone_is_definite(damping):
    """Two inputs and four classes: JᵀSJ spans all that is free, so that c = 0 is not to be divided by."""
    torch.manual_seed(3)
    model = nn.Linear(2, 4).double()
    problem = ba.BilevelProblem(ba.UpperProblem(), Pushed(ba.CrossEntropy(0.9), 100.0))
    batch = batch_of(3, 2)
    a = GaussNewtonKKT(damping=damping, margin=1e-9).hypergradient(problem, model, batch)
    b = FullKKT(method="dense").hypergradient(problem, model, batch)
    assert b.implicit_norm > 0.1 * b.direct_norm
    for name, g in b.grads.items():
        torch.testing.assert_close(a.grads[name], g, rtol=1e-8, atol=1e-10)


def test_without_a_proximal_term_where_nothing_is_free():
    model, batch = dense(6, 8, 3), batch_of(4, 6)
    problem = ba.BilevelProblem(ba.UpperProblem(), Pushed(ATK, 0.01))
    step = GaussNewtonKKT().hypergradient(problem, model, batch)
    assert step.implicit_norm == 0  # every coordinate is at its bound


def test_what_is_not_a_number_is_not_taken_for_coupled():
    model, batch = dense(6, 8, 3), batch_of(3, 6)
    with torch.no_grad():
        model[-1].bias.fill_(torch.nan)
    with pytest.raises(ba.ConvergenceError, match="the attack loss is not a number on samples 0, 1, 2"):
        GaussNewtonKKT().hypergradient(taylor(step=0.1), model, batch)
