"""Closed forms: δ* satisfies its KKT conditions, linearised and proximal; what lower problems refuse."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import ATK, batch_of, dense, network, proximal, taylor
from scipy.optimize import nnls
from transcriptions import ce_gradient, clip, seeded

import bilevel_at as ba
from bilevel_at.problem import objective_gradient
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck
from bilevel_at.testing import strategies as bst

TOL = 1e-8


def gradient_of_g(s, delta):
    delta = delta.detach().requires_grad_()
    value = s.problem.lower.objective(s.model, s.batch, delta, s.anchor).sum()
    return torch.autograd.grad(value, delta)[0]


def in_normal_cone(constraint, delta, x, gradient):
    """Whether −∇g lies in the cone of the outward normals of the constraints active at δ, sample by sample."""
    if isinstance(constraint, ba.LinfBall):
        low, high = constraint.box(x)
        at_low, at_high = (delta - low).abs() < 1e-9, (delta - high).abs() < 1e-9
        wrong = ((gradient < -TOL) & ~at_high) | ((gradient > TOL) & ~at_low)
        return not wrong.any()
    for d, x_i, g in zip(delta, x, gradient, strict=True):
        d, x_i, g = d.flatten(), x_i.flatten(), g.flatten()
        normals = []
        if isinstance(constraint, ba.L2Ball):
            if d.norm() > constraint.epsilon - 1e-9:
                normals.append(d.numpy())
        else:
            normals += [
                row
                for row, rest in zip(constraint.B.numpy(), (constraint.b - constraint.B @ d).tolist(), strict=True)
                if rest < 1e-9
            ]
        if constraint.bounds is not None:
            eye = np.eye(len(d))
            normals += [eye[i] for i in np.flatnonzero((1 - x_i - d).numpy() < 1e-9)]
            normals += [-eye[i] for i in np.flatnonzero((x_i + d).numpy() < 1e-9)]
        residual = nnls(np.stack(normals).T, -g.numpy())[1] if normals else g.norm().item()
        if residual > 1e-7 * (1 + g.norm().item()):
            return False
    return True


@pytest.mark.parametrize("direction", ["sign", "taylor", "normalized"])
@pytest.mark.parametrize(
    "constraint", [lambda s: bst.boxes(), lambda s: bst.l2_balls(), bst.polyhedra], ids=["box", "l2", "polyhedron"]
)
@examples(0.3)
@given(data=st.data())
def test_closed_form_satisfies_its_kkt_conditions(direction, constraint, data):
    s = data.draw(bst.settings_of(lambda c, m: bst.linearized(c, m, direction), constraint, max_values=8))
    delta = s.problem.lower.solve(s.model, s.batch, anchor=s.anchor).delta
    assert in_normal_cone(s.problem.lower.constraint, delta, s.batch.x, gradient_of_g(s, delta))


@examples(0.3)
@given(s=bst.settings_of(bst.proximal, lambda s: bst.boxes()))
def test_proximal_satisfies_its_kkt_conditions(s):
    solution = s.problem.lower.solve(s.model, s.batch, anchor=s.anchor)
    assert in_normal_cone(s.problem.lower.constraint, solution.delta, s.batch.x, gradient_of_g(s, solution.delta))
    assert solution.residual.max() <= s.problem.lower.tol


@given(s=bst.settings_of(bst.linearized, lambda s: bst.boxes()))
def test_solution_gradient_is_that_of_the_objective(s):
    """What a differentiable solve keeps is ∇_δ g at δ*, and so is its derivative in θ."""
    solution = s.problem.lower.solve(s.model, s.batch, anchor=s.anchor, differentiable=True)
    delta = solution.delta.clone().requires_grad_()
    value = s.problem.lower.objective(s.model, s.batch, delta, s.anchor).sum()
    (expected,) = torch.autograd.grad(value, delta, create_graph=True)
    torch.testing.assert_close(solution.gradient, expected)
    w = torch.randn_like(expected)
    parameters = list(s.model.parameters())
    ours = torch.autograd.grad(solution.gradient, parameters, w, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, w, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_combinations_nobody_published_are_one_line():
    """Remembered anchors, Taylor direction, adaptive steps: held as drawn, the hypergradient is exact."""
    model, x, y = network()
    batch = ba.Batch(x, y, index=torch.arange(5))
    step = ba.Adaptive(gamma=0.5, c=1.0)
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.2), "remembered", "taylor", step)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)

    assert hypergradcheck(problem, HessianFreeKKT(), model, batch, eps=1e-5, rtol=1e-6)


def test_policies_refuse_what_they_do_not_know():
    ball, atk = ba.LinfBall(0.1), ba.minus(ba.cross_entropy)
    with pytest.raises(ba.InputError, match="anchor 'middle' is not known; choose from zero, uniform"):
        ba.Linearized(atk, ball, anchor="middle")
    with pytest.raises(ba.InputError, match="direction 'up' is not known"):
        ba.Linearized(atk, ball, direction="up")
    for step in (0, -1.0, float("nan"), "big"):
        with pytest.raises(ba.InputError, match="step is"):
            ba.Linearized(atk, ball, step=step)
    for lam in (0, -2.0, "x"):
        with pytest.raises(ba.InputError, match="lam is"):
            ba.Proximal(atk, ball, lam=lam)
    for wrong, says in (
        (lambda: ba.Remembered(reset_every=-1), "reset_every is -1; it must be a whole number, at least 0"),
        (lambda: ba.Remembered(size=2.5), "size is 2.5; it must be a whole number, at least 1"),
        (lambda: ba.Steps(count=1.5), "count is 1.5; it must be a whole number, at least 0"),
        (lambda: ba.Gaussian(0.0), "scale is 0; it must be a positive finite number"),
        (lambda: ba.Adaptive(1.0, 1.0, warmup_epochs=-1), "warmup_epochs is -1"),
        (lambda: ba.Adaptive(1.0, 1.0, warmup_step=float("nan")), "warmup_step is nan"),
        (lambda: ba.Adaptive(1.0, 1.0, low=0.2, high=0.1), "steps are clipped to 0.2 … 0.1"),
        (lambda: ba.Remembered(start="gradient-step"), "begins at a Start such as 'uniform' or 'zero', not Steps"),
        (lambda: ba.Remembered(by="row"), "by is 'row'; choose from 'example', 'position'"),
    ):
        with pytest.raises(ba.InputError, match=re.escape(says)):
            wrong()
    model, x, y = network()
    few = ba.Linearized(lambda *a: atk(*a)[:-1], ball)
    with pytest.raises(ba.InputError, match=r"the attack loss has shape \(4,\); it must be one value per sample, \["):
        few.solve(model, ba.Batch(x, y))

    class Prepares(ba.CrossEntropy):
        def prepare(self, model, batch, generator):
            return batch.x

    with pytest.raises(ba.InputError, match="prepare returns Tensor; it must return the Batch"):
        ba.Linearized(Prepares(), ball).solve(model, ba.Batch(x, y))
    with pytest.raises(ba.InputError, match="prepare returns Tensor; it must return the Batch"):
        ZeroIG().hypergradient(ba.BilevelProblem(ba.UpperProblem(Prepares()), taylor().lower), model, ba.Batch(x, y))
    with pytest.raises(ba.InputError, match="mode 'test' is not known"):
        ba.Linearized(atk, ball, mode="test").solve(model, ba.Batch(x, y))
    with pytest.raises(ba.InputError, match=r"AtAnchor has no step of its own; give the anchor one: Steps\(step=...\)"):
        ba.AtAnchor(ball, "gradient-step").solve(model, ba.Batch(x, y))


def test_steps_of_the_anchor_are_those_of_the_problem():
    """Also adaptive ones, each as long as the gradient where it is taken asks for."""
    model, x, y = network()
    lower = ba.Linearized(ATK, ba.LinfBall(0.3), "gradient-step", "taylor", ba.Adaptive(1.0, 1.0, beta=0.0))
    solution = lower.solve(model, ba.Batch(x, y, index=torch.arange(5)), generator=seeded(1))
    z = ba.LinfBall(0.3).sample(x, seeded(1))
    for expected in (solution.anchor, solution.delta):
        gradient = ce_gradient(model, x + z, y)
        z = clip(z + gradient / (1 + gradient.flatten(1).norm(dim=1))[:, None, None, None], x, 0.3)
        torch.testing.assert_close(expected, z)


def test_proximal_states_where_it_did_not_converge():
    model, x, y = network()
    lower = ba.Proximal(ba.minus(ba.cross_entropy), ba.LinfBall(0.5), lam=1.0, tol=1e-14, max_iter=3)
    with pytest.raises(
        ba.ConvergenceError, match=r"did not reach tol=1e-14 in max_iter=3 steps on samples? \d"
    ) as error:
        lower.solve(model, ba.Batch(x, y))
    assert set(error.value.samples) <= set(range(5)) and error.value.samples


@examples(0.3)
@given(s=bst.settings_of(bst.proximal, lambda s: bst.boxes(), max_size=3))
def test_proximal_is_where_scipy_finds_it(s):
    from scipy.optimize import minimize

    lower, model = s.problem.lower, s.model
    delta = lower.solve(model, s.batch, anchor=s.anchor).delta
    low, high = lower.constraint.box(s.batch.x)
    for i in range(len(s.batch)):
        one = s.batch[i : i + 1]

        def value_and_gradient(flat, one=one, i=i):
            d = torch.tensor(flat).reshape(one.x.shape).requires_grad_()
            value = lower.objective(model, one, d, s.anchor[i : i + 1]).sum()
            return value.item(), torch.autograd.grad(value, d)[0].flatten().numpy()

        bounds = list(zip(low[i].flatten().tolist(), high[i].flatten().tolist(), strict=True))
        reference = minimize(
            value_and_gradient,
            np.zeros(one.x.numel()),
            jac=True,
            bounds=bounds,
            method="L-BFGS-B",
            options={"ftol": 1e-16, "gtol": 1e-12},
        )
        assume(reference.success)
        np.testing.assert_allclose(delta[i].flatten().numpy(), reference.x, atol=1e-5)


def test_a_solution_needs_only_delta_anchor_and_batch():
    """Then it has no derivative, and KKT solvers refuse it rather than train as ZeroIG."""

    class Own(ba.LowerProblem):
        constraint = ba.LinfBall(0.1)

        def objective(self, model, batch, delta, anchor):
            return 0.5 * (delta - anchor).flatten(1).square().sum(1) + ATK(model, batch, delta)

        def solve_at(self, model, batch, anchor, differentiable):
            return ba.Solution(torch.zeros_like(batch.x), anchor, batch)

    class WithGradient(Own):
        def solve_at(self, model, batch, anchor, differentiable):
            solution = super().solve_at(model, batch, anchor, differentiable)
            gradient = objective_gradient(self, model, batch, solution.delta, anchor) if differentiable else None
            return replace(solution, gradient=gradient)

    problem, model, batch = ba.BilevelProblem(ba.UpperProblem(), Own()), dense(6, 5, 3), batch_of(3, 6)
    assert ZeroIG().backward(problem, model, batch).loss.isfinite()
    for solver in (HessianFreeKKT(damping=1.0), FullKKT(damping=5.0)):
        name = type(solver).__name__
        with pytest.raises(ba.InputError, match=rf"a δ\* without a derivative .* {name} needs; use ZeroIG"):
            solver.backward(problem, model, batch)
        step = solver.backward(ba.BilevelProblem(ba.UpperProblem(), WithGradient()), model, batch)
        assert step.loss.isfinite() and step.implicit_norm > 0


def test_inputs_that_require_a_gradient_leave_no_graph():
    batch = batch_of(3, 6)
    batch.x.requires_grad_()
    for problem in (taylor(), proximal()):
        solution = problem.lower.solve(dense(6, 5, 3), batch)
        assert not solution.delta.requires_grad and not solution.anchor.requires_grad
