"""cross_at="merged": cross_at="solution" to first order in ig_weight/λ, from two first-order passes."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import ATK, batch_of, dense, proximal, taylor, with_batch_norm
from own_constraints import Cylinder, Slab
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bilevel_at as ba
from bilevel_at.models import build_model
from bilevel_at.problems import fastbat, standard, trades
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ProjectionAdjoint, ZeroIG

SETS = {
    "box": ba.LinfBall(0.2),
    "l2": ba.L2Ball(0.3),
    "polyhedron": ba.Polyhedron(torch.eye(6).double() - 0.3, torch.full((6,), 0.2).double()),
    "own": Slab(0.1),
}


def gap(a, b):
    return torch.stack([(a.grads[n] - g).norm() for n, g in b.grads.items() if g is not None]).norm().item()


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("problem", [taylor(step=0.3, mode="train"), proximal(lam=5.0, mode="train")], ids=["t", "p"])
def test_the_error_falls_as_the_square_of_the_weight(problem, kind):
    model, batch = dense(6, 8, 3).train(), batch_of(3, 6)
    problem.lower.constraint = SETS[kind]
    errors = []
    for weight in (0.02, 0.01):
        exact = HessianFreeKKT(weight, cross_at="solution").hypergradient(problem, model, batch)
        merged = HessianFreeKKT(weight, cross_at="merged").hypergradient(problem, model, batch)
        assert torch.equal(merged.losses, exact.losses)
        torch.testing.assert_close(merged.v, exact.v)
        errors.append(gap(merged, exact))
        assert errors[-1] < 0.05 * exact.implicit_norm
        assert merged.implicit == {} and merged.implicit_norm == 0
    assert errors[1] > 1e-12 and errors[1] / errors[0] == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("solver", [FullKKT, ProjectionAdjoint])
def test_any_adjoint_can_be_merged(solver):
    model, batch, problem = dense(6, 8, 3).train(), batch_of(3, 6), proximal(lam=5.0, mode="train")
    exact = solver(ig_weight=1e-3).hypergradient(problem, model, batch)
    merged = solver(ig_weight=1e-3, cross_at="merged").hypergradient(problem, model, batch)
    assert gap(merged, exact) < 1e-3 * exact.implicit_norm


def test_a_set_that_can_only_be_projected_onto():
    model, batch, problem = dense(6, 8, 3).train(), batch_of(3, 6), taylor(step=0.3, mode="train")
    problem.lower.constraint = Cylinder(0.2)
    exact = ProjectionAdjoint(1e-3, cross_at="solution").hypergradient(problem, model, batch)
    merged = ProjectionAdjoint(1e-3, cross_at="merged").hypergradient(problem, model, batch)
    assert exact.implicit_norm > 0 and gap(merged, exact) < 1e-3 * exact.implicit_norm


def test_batch_normalisation_in_train_mode_scale_and_running_statistics():
    batch, problem, steps, buffers = batch_of(6, 6), taylor(step=0.05, mode="train"), [], []
    for cross_at in ("solution", "merged"):
        model = with_batch_norm().train()
        steps.append(HessianFreeKKT(1e-2, cross_at=cross_at).hypergradient(problem, model, batch, scale=64.0))
        buffers.append(list(model.buffers()))
    assert gap(steps[1], steps[0]) < 1e-2 * 64 * steps[0].implicit_norm
    plain = HessianFreeKKT(1e-2, cross_at="anchor")
    model = with_batch_norm().train()
    plain.hypergradient(problem, model, batch)
    # those of "solution" have moved once more, by its pass for the derivative at δ*
    for got, want in zip(buffers[1], model.buffers(), strict=True):
        torch.testing.assert_close(got, want)


def test_both_passes_drop_the_same_units():
    model = dense(6, 8, 3)
    model = nn.Sequential(*model[:3], nn.Dropout(0.5), *model[3:]).train()
    batch = batch_of(3, 6)
    solver = HessianFreeKKT(1e-9, cross_at="merged")
    torch.manual_seed(1)
    merged = solver.hypergradient(taylor(step=0.3, mode="train"), model, batch)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    zero = ZeroIG().hypergradient(taylor(step=0.3, mode="train"), model, batch)
    assert torch.equal(after, torch.get_rng_state())
    assert gap(merged, zero) < 1e-6 * zero.direct_norm


def test_a_sign_direction_has_nothing_to_merge():
    model, batch = dense(6, 8, 3), batch_of(3, 6)
    lower = ba.Linearized(ATK, ba.LinfBall(0.2), "zero", "sign", 0.2)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    merged = HessianFreeKKT(cross_at="merged").hypergradient(problem, model, batch)
    assert gap(merged, ZeroIG().hypergradient(problem, model, batch)) == 0


def test_a_step_costs_nine_passes():
    """3.00 times a standard step on PreActResNet-18, where cross_at="solution" costs 4.37."""
    torch.manual_seed(0)
    model = build_model("preact_resnet18", (3, 32, 32), 10).train()
    batch = ba.Batch(torch.rand(2, 3, 32, 32), torch.tensor([3, 7]), torch.arange(2))

    def flops(problem, solver):
        for parameter in model.parameters():
            parameter.grad = None
        with FlopCounterMode(display=False) as counter:
            solver.backward(problem, model, batch)
        return counter.get_total_flops()

    base = flops(standard.problem(), ZeroIG())
    multiples = [flops(fastbat.problem(), HessianFreeKKT(0.1, cross_at=at)) / base for at in ("merged", "solution")]
    print(f"merged {multiples[0]:.3f}, solution {multiples[1]:.3f} × a standard step")
    assert multiples[0] <= 3.01 and multiples[1] > 4.3


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (taylor(mode="eval"), "attack passes in the network's own mode; here they are in 'eval' mode"),
        (ba.BilevelProblem(ba.UpperProblem(ba.CrossEntropy(0.1)), taylor(mode="train").lower), "minus the upper loss"),
        (  # the same share, over other classes
            ba.BilevelProblem(
                ba.UpperProblem(ba.CrossEntropy(0.5, "others")),
                ba.Linearized(ba.minus(ba.CrossEntropy(0.5)), SETS["box"], "zero", "taylor", mode="train"),
            ),
            "minus the upper loss",
        ),
        (ba.BilevelProblem(trades.Tradeoff(6.0), taylor(mode="train").lower), "minus the upper loss"),
        (
            ba.BilevelProblem(
                ba.UpperProblem(), ba.Linearized(ba.minus(ba.negative_margin), SETS["box"], "zero", "taylor")
            ),
            "minus the upper loss",
        ),
        (
            ba.BilevelProblem(ba.UpperProblem(), ba.Linearized(ATK, SETS["box"], "zero", "normalized", mode="train")),
            'Linearized with direction "taylor"',
        ),
    ],
)
def test_where_it_is_not_defined(problem, line):
    with pytest.raises(ba.InputError, match=f'cross_at="merged" needs.*{line}.*use cross_at="solution"'):
        HessianFreeKKT(cross_at="merged").hypergradient(problem, dense(6, 8, 3).train(), batch_of(3, 6))


class Mean(ba.Loss):
    """Coupled: one number for the batch."""

    def value(self, output, batch):
        return nn.functional.cross_entropy(output, batch.y)


def test_a_coupled_loss():
    model, batch, loss = dense(6, 8, 3).train(), batch_of(3, 6), Mean()
    lower = ba.Linearized(ba.minus(loss), ba.LinfBall(0.2), "zero", "taylor", 0.9, mode="train")
    problem = ba.BilevelProblem(ba.UpperProblem(loss), lower)
    exact = HessianFreeKKT(1e-3, cross_at="solution").hypergradient(problem, model, batch)
    merged = HessianFreeKKT(1e-3, cross_at="merged").hypergradient(problem, model, batch)
    assert exact.implicit_norm > 0 and gap(merged, exact) < 1e-2 * exact.implicit_norm


def test_a_copy_of_a_problem_is_merged_too():
    """As the run command's trial step makes one; its direction is another object that says the same."""
    problem, batch = fastbat.problem(0.2, step=1.0), batch_of(4, 4)
    solver, model = HessianFreeKKT(ig_weight=0.1, cross_at="merged"), dense(4, 5, 3)
    model.train()
    steps = [
        solver.hypergradient(p, model, batch, generator=torch.Generator().manual_seed(0))
        for p in (problem, copy.deepcopy(problem))
    ]
    assert all(torch.equal(g, steps[1].grads[name]) for name, g in steps[0].grads.items())
