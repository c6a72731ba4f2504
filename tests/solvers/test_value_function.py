"""ValueFunction: an error of s², first-order passes alone, and the same draws in every one."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import Quadratic, batch_of, dense, proximal, taylor, with_batch_norm
from own_constraints import Cylinder, slabs
from torch import nn

import bilevel_at as ba
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ValueFunction, ZeroIG
from bilevel_at.testing import activity_margin, hypergradcheck
from bilevel_at.testing import strategies as bst

CONSTRAINTS = {
    "box": lambda shape: bst.boxes(),
    "l2": lambda shape: bst.l2_balls(),
    "polyhedron": bst.polyhedra,
    "own": slabs,
}


def difference(step, exact):
    """‖difference‖ of two hypergradients, of the norm of the implicit term."""
    gaps = [step.grads[n] - g for n, g in exact.grads.items() if g is not None]
    return (torch.stack([gap.norm() for gap in gaps]).norm() / exact.implicit_norm).item()


@pytest.mark.parametrize("kind", CONSTRAINTS)
@examples(0.2)
@given(data=st.data())
def test_it_tends_to_full_kkt_on_the_proximal_problem(kind, data):
    s = data.draw(bst.settings_of(bst.proximal, CONSTRAINTS[kind], max_values=6, max_size=2))
    assume(activity_margin(s.problem, s.model, s.batch, s.anchor) > 1e-2)
    exact = FullKKT(method="dense").hypergradient(s.problem, s.model, s.batch, anchor=s.anchor)
    assume(exact.implicit_norm > 1e-3 * exact.direct_norm)
    step = ValueFunction(1e-3).hypergradient(s.problem, s.model, s.batch, anchor=s.anchor)
    torch.testing.assert_close(step.losses, exact.losses, rtol=0, atol=0)
    assert difference(step, exact) < 1e-5


@pytest.mark.parametrize("direction", ["taylor", "normalized"])
@pytest.mark.parametrize("kind", ["box", "l2", "own"])
@examples(0.2)
@given(data=st.data())
def test_it_tends_to_hessian_free_kkt_on_a_linearised_problem(kind, direction, data):
    lower = lambda constraint, model: bst.linearized(constraint, model, direction)  # noqa: E731
    s = data.draw(bst.settings_of(lower, CONSTRAINTS[kind], max_values=6, max_size=2))
    assume(activity_margin(s.problem, s.model, s.batch, s.anchor) > 1e-2)
    exact = HessianFreeKKT().hypergradient(s.problem, s.model, s.batch, anchor=s.anchor)
    assume(exact.implicit_norm > 1e-3 * exact.direct_norm)
    assume(exact.solution.attack_gradient.flatten(1).norm(dim=1).min() > 1e-2)
    # An error of 162 s² was seen, where the implicit term is three times the direct one.
    step = ValueFunction(1e-4).hypergradient(s.problem, s.model, s.batch, anchor=s.anchor)
    assert difference(step, exact) < 1e-5


@pytest.mark.parametrize("lower", ["taylor", "proximal", "own objective"])
@pytest.mark.parametrize("constraint", [ba.LinfBall(0.2), ba.L2Ball(0.3), Cylinder(0.2)], ids=["box", "l2", "cylinder"])
def test_the_error_falls_as_the_square_of_s(lower, constraint):
    model, batch = dense(6, 8, 3), batch_of(3, 6)
    problem = {"taylor": taylor(step=0.3), "proximal": proximal(lam=3.0), "own objective": None}[lower]
    if problem is None:
        problem = ba.BilevelProblem(ba.UpperProblem(), Quadratic())
    problem.lower.constraint = constraint
    reference = ValueFunction(1e-4).hypergradient(problem, model, batch)  # its own error is below 1e-7
    if not isinstance(constraint, Cylinder):
        exact = FullKKT(method="dense").hypergradient(problem, model, batch)
        assert difference(reference, exact) < 1e-6
    assert hypergradcheck(problem, ValueFunction(1e-4), model, batch, eps=1e-5, rtol=1e-6)
    errors = [
        difference(ValueFunction(s, tol=1e-13).hypergradient(problem, model, batch), reference) for s in (0.02, 0.01)
    ]
    assert 1e-9 < errors[1] < 1e-2 and errors[1] / errors[0] == pytest.approx(0.25, rel=0.1)


class Slope(torch.autograd.Function):
    """The derivative of tanh at y = tanh(x), times ``grad``: a kernel without a derivative of its own."""

    @staticmethod
    def forward(ctx, y, grad):
        return grad * (1 - y * y)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("this kernel has no second derivative")


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return Slope.apply(y, grad)


class Once(Kernel):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


def module(function):
    return type("Fused", (nn.Module,), {"forward": lambda self, x: function.apply(x)})


@pytest.mark.parametrize("problem", [taylor(step=0.3), proximal(lam=3.0)], ids=["taylor", "proximal"])
def test_a_network_without_double_backward(problem):
    model, batch = dense(6, 8, 3), batch_of(3, 6)
    exact = FullKKT().hypergradient(problem, model, batch)
    kernel, once = (dense(6, 8, 3, activation=module(function)) for function in (Kernel, Once))
    with pytest.raises(RuntimeError, match="no second derivative"):
        HessianFreeKKT().hypergradient(problem, kernel, batch)
    # What torch marks as once_differentiable is a constant to autograd.grad, in silence.
    assert difference(HessianFreeKKT().hypergradient(problem, once, batch), exact) > 0.05
    for fused in (kernel, once):
        assert difference(ValueFunction(1e-3).hypergradient(problem, fused, batch), exact) < 1e-5


class Noisy(ba.UpperProblem):
    """f at a point that noise has moved: random, as GradAlign's is."""

    def loss_at(self, model, batch, solution, generator=None):
        noise = 0.1 * torch.randn(batch.x.shape, generator=generator, dtype=batch.x.dtype)
        return ba.cross_entropy(model, batch, solution.delta + noise)


def test_every_pass_has_the_same_draws_and_the_generator_moves_on_as_ever():
    model, batch, problem = dense(6, 8, 3), batch_of(3, 6), taylor(step=0.3)
    problem.upper = Noisy()
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    step = ValueFunction(1e-3).hypergradient(problem, model, batch, generator=ours)
    exact = HessianFreeKKT().hypergradient(problem, model, batch, generator=theirs)
    assert difference(step, exact) < 1e-5
    assert torch.equal(ours.get_state(), theirs.get_state())
    # and without a generator, from torch's own; dropout draws from that too
    model = nn.Sequential(model[:2], nn.Dropout(0.3), *model[2:]).train()
    torch.manual_seed(5)
    step = ValueFunction(1e-3).hypergradient(problem, model, batch)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    exact = HessianFreeKKT().hypergradient(problem, model, batch)
    assert torch.equal(after, torch.get_rng_state())
    assert difference(step, exact) < 1e-5


def test_running_statistics_move_as_under_other_solvers():
    batch = batch_of(6, 6)
    buffers = []
    for solver in (ValueFunction(), HessianFreeKKT(), ZeroIG()):
        model = with_batch_norm().train()
        solver.hypergradient(taylor(step=0.05, mode="train"), model, batch)
        buffers.append([b.clone() for b in model.buffers()])
    for other in buffers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(buffers[0], other, strict=True))


def test_scale_and_weight():
    model, batch, problem = dense(6, 8, 3), batch_of(3, 6), taylor(step=0.3)
    plain = ValueFunction(1e-2).hypergradient(problem, model, batch)
    scaled = ValueFunction(1e-2, ig_weight=0.5).hypergradient(problem, model, batch, scale=1024.0)
    for name, g in plain.implicit.items():
        if g is not None:
            torch.testing.assert_close(scaled.implicit[name], 512 * g)


def test_refusals():
    with pytest.raises(ba.InputError, match="s is 0; it must be a positive"):
        ValueFunction(0.0)
    model, batch = dense(6, 8, 3), batch_of(3, 6)
    few_steps = ba.BilevelProblem(ba.UpperProblem(), ba.Targeted(ba.LinfBall(0.3), steps=2))
    with pytest.raises(ba.InputError, match="Targeted's δ\\* is not a minimiser of its objective"):
        ValueFunction().hypergradient(few_steps, model, batch)
    with pytest.raises(ba.ConvergenceError, match="was not minimised to tol"):
        ValueFunction(max_iter=1).hypergradient(taylor(step=0.3), model, batch)


def test_single_precision():
    model, batch = dense(6, 8, 3), batch_of(3, 6)
    exact = HessianFreeKKT().hypergradient(taylor(step=0.3), model, batch)
    batch = ba.Batch(batch.x.float(), batch.y)
    step = ValueFunction().hypergradient(taylor(step=0.3), model.float(), batch)
    assert difference(step, exact) < 1e-2


def test_the_default_suits_single_precision_and_steep_networks():
    """s = 0.1 is not small against λ/‖∇²f‖ here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 10)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    x, y = torch.rand(32, 1, 8, 8, dtype=torch.float64), torch.arange(32) % 10
    exact = HessianFreeKKT().hypergradient(taylor(0.1, step=0.3), model, ba.Batch(x, y))
    steps = [
        solver.hypergradient(taylor(0.1, step=0.3), model.float(), ba.Batch(x.float(), y))
        for solver in (ValueFunction(), ValueFunction(0.1))
    ]
    assert difference(steps[0], exact) < 0.05 < difference(steps[1], exact)


def test_dropout_in_attack_passes_drops_the_same_units_in_both():
    """Else the difference of two networks, divided by 2s: thousands of times too long."""
    model, batch = dense(6, 8, 3), batch_of(3, 6)
    model = nn.Sequential(*model[:3], nn.Dropout(0.3), *model[3:]).train()
    problem = taylor(step=0.3, mode="train")
    for seed in range(3):
        norms = []
        for solver in (HessianFreeKKT(), ValueFunction(1e-3)):
            torch.manual_seed(seed)
            norms.append(solver.hypergradient(problem, model, batch).implicit_norm.item())
        assert 0.5 < norms[1] / norms[0] < 2  # the attack itself drops others


@pytest.mark.parametrize(
    "generator", [None, torch.default_generator, torch.Generator()], ids=["none", "torch's", "own"]
)
def test_draws_are_made_again_from_any_generator(generator):
    """Dropout and the upper loss draw from one stream where the generator is torch's own."""
    model, batch = dense(6, 8, 3), batch_of(3, 6)
    model = nn.Sequential(*model[:3], nn.Dropout(0.3), *model[3:]).train()
    problem = ba.BilevelProblem(Noisy(), taylor(step=0.3).lower)
    steps = []
    for solver in (HessianFreeKKT(), ValueFunction(1e-3)):
        torch.manual_seed(0)
        if generator is not None:
            generator.manual_seed(0)
        steps.append(solver.hypergradient(problem, model, batch, generator=generator))
    assert difference(steps[1], steps[0]) < 1e-5
