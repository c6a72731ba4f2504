"""FullKKT: what it refuses, coupled samples, the attack's Hessian."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given
from networks import ATK, F64, batch_of, dense, proximal, taylor, with_batch_norm
from torch import nn

import bilevel_at as ba
from bilevel_at.problem import objective_gradient
from bilevel_at.solvers import FullKKT, GaussNewtonKKT, HessianFreeKKT
from bilevel_at.testing import hypergradcheck
from bilevel_at.testing import strategies as bst


class Saddle(ba.LowerProblem):
    """g = ½ Σ_k a_k(x) δ_k², whose curvature in sample i is x_i itself, shifted: negative where x < ½."""

    constraint = ba.LinfBall(1.0, bounds=None)

    def objective(self, model, batch, delta, anchor):
        return 0.5 * ((batch.x - 0.5) * (delta - model(batch.x).mean(1, keepdim=True)) ** 2).flatten(1).sum(1)

    def solve_at(self, model, batch, anchor, differentiable):
        delta = torch.full_like(batch.x, 0.1)
        gradient = objective_gradient(self, model, batch, delta, anchor) if differentiable else None
        return ba.Solution(delta, anchor, batch, gradient=gradient)


@pytest.mark.parametrize("method", ["dense", "cg"])
def test_full_kkt_names_the_samples_it_refuses(method):
    x = torch.full((4, 3), 0.9, dtype=F64)
    x[1, 0] = x[3, 2] = 0.2
    batch = ba.Batch(x, torch.tensor([0, 1, 2, 0]))
    problem = ba.BilevelProblem(ba.UpperProblem(), Saddle())
    with pytest.raises(ba.CurvatureError, match="not positive definite on the free directions") as error:
        FullKKT(method=method).hypergradient(problem, dense(3, 3), batch)
    # Cholesky sees every indefinite sample; CG those whose right-hand side met the negative direction
    assert set(error.value.samples) <= {1, 3} and error.value.samples
    if method == "dense":
        assert error.value.samples == (1, 3)
    # a negative curvature that a bound holds down is no obstacle
    bounded = copy.deepcopy(problem)
    bounded.lower.constraint = ba.Polyhedron(torch.eye(3, dtype=F64), torch.full((3,), 0.1, dtype=F64))
    FullKKT(method=method).hypergradient(bounded, dense(3, 3), batch)
    FullKKT(method=method, damping=1.0).hypergradient(problem, dense(3, 3), batch)


def test_auto_takes_conjugate_gradients_and_lets_dense_decide_where_they_doubt(monkeypatch):
    x = torch.full((4, 3), 0.9, dtype=F64)
    x[1, 0] = x[3, 2] = 0.2
    indefinite = ba.Batch(x, torch.tensor([0, 1, 2, 0]))
    saddle = ba.BilevelProblem(ba.UpperProblem(), Saddle())
    with pytest.raises(ba.CurvatureError, match="free directions of samples 1, 3; raise λ or damping") as error:
        FullKKT().hypergradient(saddle, dense(3, 3), indefinite)
    assert error.value.samples == (1, 3)
    # where it is not affordable, what conjugate gradients met stands
    with pytest.raises(ba.CurvatureError, match="conjugate gradients met non-positive curvature"):
        FullKKT(dense_limit=2).hypergradient(saddle, dense(3, 3), indefinite)

    model, batch, problem = dense(6, 5, 3), batch_of(4, 6), proximal()
    expected = FullKKT(method="dense").hypergradient(problem, model, batch)
    late = FullKKT(max_iter=1, tol=1e-14).hypergradient(problem, model, batch)
    for name, g in expected.grads.items():
        assert torch.equal(late.grads[name], g)
    with pytest.raises(ba.ConvergenceError, match="did not reach tol"):
        FullKKT(max_iter=1, tol=1e-14, dense_limit=5).hypergradient(problem, model, batch)
    dropout = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double().train()
    with pytest.raises(ba.ConvergenceError, match="did not reach tol"):  # torch.func cannot take it
        FullKKT(curvature="attack", max_iter=1, tol=1e-14).hypergradient(
            taylor(step=0.005, mode="train"), dropout, batch_of(3, 6)
        )

    def never(*args):
        raise AssertionError("no Hessian is formed where conjugate gradients converge")

    monkeypatch.setattr("bilevel_at.solvers.full_kkt.dense_hessian", never)
    quick = FullKKT(tol=1e-12).hypergradient(problem, model, batch)
    for name, g in expected.grads.items():
        torch.testing.assert_close(quick.grads[name], g, rtol=1e-9, atol=1e-13)


def test_hessian_aware_is_the_attack_hessian_plus_lambda():
    """curvature="attack" on a linearised problem: H = ∇²ℓ_atk(θ, δ*) + λI, transcribed."""
    model, batch, problem = dense(6, 5, 3), batch_of(3, 6), taylor(epsilon=0.01, step=0.05)
    for method in ("dense", "cg"):
        step = FullKKT(method=method, curvature="attack", tol=1e-13).hypergradient(problem, model, batch)
        solution = problem.lower.solve(model, batch, anchor=torch.zeros_like(batch.x), differentiable=True)
        delta = solution.delta.clone().requires_grad_()
        (v,) = torch.autograd.grad(ba.cross_entropy(model, batch, delta).mean(), delta)
        low, high = ba.LinfBall(0.01).box(batch.x)
        free = (solution.delta > low) & (solution.delta < high)
        assert 0 < free.sum() < free.numel()
        w = torch.zeros_like(v)
        for i in range(3):
            H = torch.autograd.functional.hessian(
                lambda d, i=i: ATK(model, batch[i : i + 1], d[None]).sum(), solution.delta[i]
            )
            F = free[i]
            w[i, F] = torch.linalg.solve((H + 20 * torch.eye(6, dtype=F64))[F][:, F], v[i, F])
        cross = torch.autograd.grad(solution.gradient, list(model.parameters()), w, allow_unused=True)
        direct = torch.autograd.grad(ba.cross_entropy(model, batch, solution.delta).mean(), list(model.parameters()))
        for got, d, c in zip(step.grads.values(), direct, cross, strict=True):
            torch.testing.assert_close(got, d if c is None else d - c)


def test_attack_curvature_needs_an_attack_loss():
    problem = ba.BilevelProblem(ba.UpperProblem(), Saddle())
    with pytest.raises(ba.InputError, match="needs an attack_loss, and Saddle has none"):
        FullKKT(curvature="attack").hypergradient(problem, dense(3, 3), batch_of(2, 3))


def test_dense_hessian_of_a_train_mode_batch_norm_is_an_error():
    model, batch = with_batch_norm().train(), batch_of(6, 6)
    with pytest.raises(ba.InputError, match='use method="cg", or mode="eval"'):
        FullKKT(method="dense").hypergradient(proximal(lam=200.0, mode="train"), model, batch)
    FullKKT(method="dense").hypergradient(proximal(lam=200.0, mode="eval"), model, batch)


def test_cg_on_the_batch_as_one_system_is_exact_under_batch_norm():
    """In train mode the samples are coupled; the batch sum's Hessian-vector products still give the exact answer."""
    model, batch = with_batch_norm().train(), batch_of(6, 6)
    problem = proximal(lam=200.0, mode="train")
    for method in ("auto", "cg"):
        assert hypergradcheck(problem, FullKKT(method=method, tol=1e-12), model, batch, eps=1e-5, rtol=1e-6)
    assert hypergradcheck(taylor(mode="train"), HessianFreeKKT(), model, batch, eps=1e-5, rtol=1e-6)


class Coupled(nn.Module):
    """Samples share a mean, without any batch normalisation to give it away."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h - h.mean(0))


def test_coupling_that_no_module_announces_is_noticed():
    torch.manual_seed(0)
    model, batch, problem = Coupled().double(), batch_of(4, 6), proximal(lam=30.0)
    with pytest.raises(ba.InputError, match="needs samples that share nothing"):
        FullKKT(method="dense").hypergradient(problem, model, batch)
    for method in ("auto", "cg"):
        assert hypergradcheck(problem, FullKKT(method=method, tol=1e-12), model, batch, eps=1e-5, rtol=1e-6)


def test_coupled_samples_are_solved_as_one_system_from_the_start():
    """Per-sample conjugate gradients would refuse systems that are positive definite as a whole."""
    torch.manual_seed(0)
    model, batch = Coupled().double(), batch_of(4, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    for lam in (8.0, 15.0, 30.0):
        problem = ba.BilevelProblem(ba.UpperProblem(), ba.Linearized(ATK, ba.LinfBall(0.3), "zero", "taylor", 1 / lam))
        solution = problem.lower.solve(model, batch, differentiable=True)
        delta = solution.delta.flatten()
        H = torch.autograd.functional.hessian(lambda d: ATK(model, batch, d.reshape(4, 6)).sum(), delta)
        H = H + lam * torch.eye(24, dtype=F64)
        free = problem.lower.constraint.active(solution.delta, batch.x).free.flatten()
        v = torch.randn(4, 6, dtype=F64)
        solver = FullKKT(curvature="attack", tol=1e-12)
        if torch.linalg.eigvalsh(H[free][:, free]).min() > 0:
            w = torch.zeros(24, dtype=F64)
            w[free] = torch.linalg.solve(H[free][:, free], v.flatten()[free])
            torch.testing.assert_close(solver.adjoint(problem, model, solution, v).flatten(), w, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_independent_samples_are_not_taken_for_coupled(mode):
    """Also in float32, under autocast, with batch normalisation in eval mode and with tiny losses."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)]
    if mode == "eval":
        layers.insert(1, nn.BatchNorm2d(4))
    model = nn.Sequential(*layers)
    batch = ba.Batch(torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1]))
    lower = ba.Linearized(lambda *a: 1e-6 * ATK(*a), ba.LinfBall(0.1), "uniform", "taylor", 0.5, mode=mode)
    # torch.func does not take batch normalisation under autocast: there "auto" goes on with cg
    for method, half in (("dense", False), ("auto", True), ("cg", True)):
        solver = FullKKT(method=method, curvature="attack")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            assert solver.hypergradient(ba.BilevelProblem(ba.UpperProblem(), lower), model, batch).loss.isfinite()


def test_auto_goes_without_torch_func_where_it_must():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double().train()
    problem = taylor(step=0.005, mode="train")
    assert FullKKT(curvature="attack").hypergradient(problem, model, batch_of(3, 6)).loss.isfinite()


def test_half_precision_is_not_factorised():
    model, batch = dense(6, 5, 3).to(torch.bfloat16), batch_of(3, 6)
    batch = ba.Batch(batch.x.to(torch.bfloat16), batch.y)
    solver = FullKKT(method="dense", curvature="attack", damping=20.0)
    step = solver.hypergradient(taylor(), model, batch)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in step.grads.values())


@given(s=bst.settings_of(bst.linearized, lambda s: bst.boxes()))
def test_conjugate_gradients_on_the_linearised_objective_find_lambda(s):
    """The Hessian of a linearised g, taken by differentiating g instead of being known, is λI all the same."""
    expected = HessianFreeKKT().hypergradient(s.problem, s.model, s.batch, anchor=s.anchor)
    lower = s.problem.lower
    lower.curvature = functools.partial(ba.LowerProblem.curvature, lower)  # ∇²g by differentiating g, and λ not added
    got = FullKKT(method="cg", tol=1e-13).hypergradient(s.problem, s.model, s.batch, anchor=s.anchor)
    for name, g in expected.grads.items():
        torch.testing.assert_close(got.grads[name], g, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("size", [4, 6, 8])
def test_coupling_of_any_two_samples_is_noticed(size):
    """Sample i shares its loss with sample i + B/2 alone, of the same parity where B/2 is even."""

    def shared(model, batch, delta):
        out = model(batch.x + delta)
        return ba.minus(ba.cross_entropy)(model, batch, delta) + 2 * (out * out.roll(size // 2, 0)).sum(1)

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    batch = ba.Batch(torch.rand(size, 5).double(), torch.arange(size) % 3)
    lower = ba.Proximal(shared, ba.LinfBall(0.3), lam=40.0, anchor="zero", tol=1e-12)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    assert hypergradcheck(problem, FullKKT(), model, batch)
    with pytest.raises(ba.InputError, match="share nothing"):
        FullKKT(method="dense").hypergradient(problem, model, batch)


def test_autocast_leaves_the_linear_algebra_alone():
    """Rounded to bfloat16, T was no projector: conjugate gradients met negative curvature of λI + JᵀSJ."""
    model, batch = dense(6, 8, 3).float(), batch_of(4, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    lower = ba.Linearized(ba.cross_entropy, ba.L2Ball(0.5), "zero", "taylor", 10.0)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    solution = lower.solve(model, ba.Batch(batch.x.float(), batch.y), differentiable=True)
    v = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    solvers = [FullKKT(method, "attack") for method in ("cg", "dense")] + [GaussNewtonKKT()]
    active = HessianFreeKKT.active(lower, model, solution)
    exact = [active.tangent(v), *(s.adjoint(problem, model, solution, v) for s in solvers)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = [active.tangent(v), *(s.adjoint(problem, model, solution, v) for s in solvers)]
    torch.testing.assert_close(half[0], exact[0], rtol=0, atol=0)
    for a, b in zip(half[1:], exact[1:], strict=True):
        assert (a - b).norm() < 3e-3 * b.norm()  # the network's passes are in bfloat16


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"tol": 0.0}, "tol is 0; it must be a positive"),
        ({"tol": "small"}, "tol is 'small'"),
        ({"max_iter": 0}, "max_iter is 0; it must be a whole number, at least 1"),
        ({"dense_limit": 1.5}, "dense_limit is 1.5; it must be a whole number"),
    ],
)
def test_bad_arguments(wrong, line):
    with pytest.raises(ba.InputError, match=line):
        FullKKT(**wrong)
