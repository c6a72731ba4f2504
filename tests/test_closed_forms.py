"""The linearised family: δ* satisfies its KKT conditions, and the published methods are points of it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.problems import fastat, fastbat, minmax
from bilevel_at.solvers import HessianFreeKKT, ZeroIG
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
@given(data=st.data())
def test_closed_form_satisfies_its_kkt_conditions(direction, constraint, data):
    s = data.draw(bst.settings_of(lambda c, m: bst.linearized(c, m, direction), constraint, max_values=8))
    delta = s.problem.lower.solve(s.model, s.batch, anchor=s.anchor).delta
    assert in_normal_cone(s.problem.lower.constraint, delta, s.batch.x, gradient_of_g(s, delta))


@given(s=bst.settings_of(bst.proximal, lambda s: bst.boxes()))
def test_proximal_satisfies_its_kkt_conditions(s):
    solution = s.problem.lower.solve(s.model, s.batch, anchor=s.anchor)
    assert in_normal_cone(s.problem.lower.constraint, solution.delta, s.batch.x, gradient_of_g(s, solution.delta))
    assert solution.residual.max() <= s.problem.lower.tol


@given(s=bst.settings_of(bst.linearized, lambda s: bst.boxes()))
def test_solution_gradient_is_that_of_the_objective(s):
    """What solve_differentiable keeps is ∇_δ g at δ*, and so is its derivative in θ."""
    solution = s.problem.lower.solve_differentiable(s.model, s.batch, anchor=s.anchor)
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


def network(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(16, 3))
    return model.double(), torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])


def input_gradient(model, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


def test_fast_at_is_one_sign_step_from_a_uniform_draw():
    model, x, y = network()
    problem = fastat.problem(epsilon=0.1)
    solution = problem.lower.solve(model, ba.Batch(x, y), generator=torch.Generator().manual_seed(1))
    z = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    low, high = torch.clamp(-x, min=-0.1), torch.clamp(1 - x, max=0.1)
    z = low + z * (high - low)
    expected = torch.clamp(z + 0.125 * input_gradient(model, x + z, y).sign(), low, high)
    torch.testing.assert_close(solution.delta, expected)
    assert ((z >= low) & (z <= high)).all() and torch.allclose(solution.anchor, z)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_pgd_is_k_sign_steps(steps):
    model, x, y = network()
    problem = minmax.problem(epsilon=0.1, steps=steps, step=0.03)
    solution = problem.lower.solve(model, ba.Batch(x, y), generator=torch.Generator().manual_seed(1))
    low, high = torch.clamp(-x, min=-0.1), torch.clamp(1 - x, max=0.1)
    delta = ba.LinfBall(0.1).sample(x, torch.Generator().manual_seed(1))
    for _ in range(steps):
        delta = torch.clamp(delta + 0.03 * input_gradient(model, x + delta, y).sign(), low, high)
    torch.testing.assert_close(solution.delta, delta)


SCHEMES = {
    "uniform": lambda model, x, y, z0, step: z0,
    "gradient-step": lambda model, x, y, z0, step: ba.LinfBall(0.1).project(
        z0 + step * input_gradient(model, x + z0, y), x
    ),
    "sign-step": lambda model, x, y, z0, step: ba.LinfBall(0.1).project(
        z0 + 0.05 * input_gradient(model, x + z0, y).sign(), x
    ),
    "corner": lambda model, x, y, z0, step: ba.LinfBall(0.1).corner(x, torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fast_bat_with_each_linearisation_scheme(scheme):
    """Equations 9 and 14 of the paper with its four schemes (Table A4), transcribed."""
    model, x, y = network()
    step, batch = 0.5, ba.Batch(x, y)
    problem = fastbat.problem(epsilon=0.1, step=step, anchor=scheme)
    hyper = HessianFreeKKT(ig_weight=0.3).hypergradient(
        problem, model, batch, generator=torch.Generator().manual_seed(1)
    )

    z = SCHEMES[scheme](model, x, y, ba.LinfBall(0.1).sample(x, torch.Generator().manual_seed(1)), step)
    low, high = ba.LinfBall(0.1).box(x)
    u = z + step * input_gradient(model, x + z, y)
    delta = torch.clamp(u, low, high)
    torch.testing.assert_close(hyper.solution.delta, delta)
    free = (u > low) & (u < high)
    v = input_gradient(model, x + delta, y) / len(x)
    point = (x + z).requires_grad_()
    (atk,) = torch.autograd.grad(-F.cross_entropy(model(point), y, reduction="sum"), point, create_graph=True)
    implicit = torch.autograd.grad((atk * (v * free * step)).sum(), list(model.parameters()), allow_unused=True)
    direct = torch.autograd.grad(F.cross_entropy(model(x + delta), y), list(model.parameters()))
    for (name, _), d, i in zip(model.named_parameters(), direct, implicit, strict=True):
        torch.testing.assert_close(hyper.grads[name], d if i is None else d - 0.3 * i)


def test_published_fast_bat_constants():
    assert fastbat.problem(epsilon=8 / 255).lower.step_size() == pytest.approx(5000 / 255)
    assert fastbat.problem(epsilon=16 / 255).lower.step_size() == pytest.approx(2000 / 255)
    assert fastbat.solver().ig_weight == pytest.approx(0.1 * 255 / 5000)
    assert fastbat.solver("full-kkt", epsilon=16 / 255).ig_weight == pytest.approx(0.1 * 255 / 2000)
    assert fastbat.solver("full-kkt").curvature == "attack"


class Counting(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x):
        self.calls += 1
        return self.model(x)


@pytest.mark.parametrize(
    ("problem", "solver", "forwards"),
    [
        (fastat.problem(), ZeroIG(), 2),
        (fastat.problem(), HessianFreeKKT(), 2),
        (minmax.problem(steps=5), ZeroIG(), 6),
        (
            fastbat.problem(),
            HessianFreeKKT(),
            3,
        ),  # warm-up, linearisation, upper loss: the implicit term needs no fourth
        (fastbat.problem(anchor="uniform"), HessianFreeKKT(), 2),
        (fastbat.problem(), HessianFreeKKT(cross_at="solution"), 4),
    ],
)
def test_nothing_is_computed_twice(problem, solver, forwards):
    model, x, y = network()
    counting = Counting(model)
    solver.hypergradient(problem, counting, ba.Batch(x, y))
    assert counting.calls == forwards


def test_combinations_nobody_published_are_one_line():
    """Remembered anchors, Taylor direction, adaptive steps: held as drawn, the hypergradient is exact."""
    model, x, y = network()
    batch = ba.Batch(x, y, index=torch.arange(5))
    step = ba.Adaptive(gamma=0.5, c=1.0)
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.2), "remembered", "taylor", step)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    from bilevel_at.testing import hypergradcheck

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
        (lambda: ba.Remembered(-1), "reset_every is -1; it must be a whole number, at least 0"),
        (lambda: ba.Remembered(size=2.5), "size is 2.5; it must be a whole number, at least 1"),
        (lambda: ba.Steps(count=1.5), "count is 1.5; it must be a whole number, at least 0"),
        (lambda: ba.Gaussian(0.0), "scale is 0; it must be a positive finite number"),
        (lambda: ba.Adaptive(1.0, 1.0, warmup_epochs=-1), "warmup_epochs is -1"),
        (lambda: ba.Adaptive(1.0, 1.0, warmup_step=float("nan")), "warmup_step is nan"),
        (lambda: ba.Adaptive(1.0, 1.0, low=0.2, high=0.1), "steps are clipped to 0.2 … 0.1"),
        (lambda: ba.BilevelProblem(ba.UpperProblem(), ba.LowerProblem(), 2.5), "replays is 2.5"),
    ):
        with pytest.raises(ba.InputError, match=re.escape(says)):
            wrong()
    model, x, y = network()
    mean = ba.Linearized(lambda *a: atk(*a).mean(), ball)
    with pytest.raises(ba.InputError, match=r"the attack loss has shape \(\); it must be one value per sample, \[5\]"):
        mean.solve(model, ba.Batch(x, y))

    class Prepares:
        def __call__(self, model, batch, delta):
            return atk(model, batch, delta)

        def prepare(self, model, batch):
            return batch.x

    with pytest.raises(ba.InputError, match="prepare\\(model, batch\\) returns Tensor; it must return the Batch"):
        ba.Linearized(Prepares(), ball).solve(model, ba.Batch(x, y))
    with pytest.raises(ba.InputError, match="mode 'test' is not known"):
        ba.Linearized(atk, ball, mode="test").solve(model, ba.Batch(x, y))
    adaptive = ba.Linearized(atk, ball, "gradient-step", "taylor", ba.Adaptive(1.0, 1.0))
    with pytest.raises(ba.InputError, match="give the anchor its own"):
        adaptive.solve(model, ba.Batch(x, y, index=torch.arange(5)))


def test_proximal_states_where_it_did_not_converge():
    model, x, y = network()
    lower = ba.Proximal(ba.minus(ba.cross_entropy), ba.LinfBall(0.5), lam=1.0, tol=1e-14, max_iter=3)
    with pytest.raises(
        ba.ConvergenceError, match=r"did not reach tol=1e-14 in max_iter=3 steps on samples? \d"
    ) as error:
        lower.solve(model, ba.Batch(x, y))
    assert set(error.value.samples) <= set(range(5)) and error.value.samples


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
        found = minimize(
            value_and_gradient,
            np.zeros(one.x.numel()),
            jac=True,
            bounds=bounds,
            method="L-BFGS-B",
            options={"ftol": 1e-16, "gtol": 1e-12},
        )
        assume(found.success)
        np.testing.assert_allclose(delta[i].flatten().numpy(), found.x, atol=1e-5)
