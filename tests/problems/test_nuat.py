"""NuAT: an attack that alternates by batch, against a reference in another mode, and one number for the whole batch."""

from __future__ import annotations

import pytest
import torch
from plain_loops import (
    CLASSES,
    EPS,
    assert_same,
    batches,
    corner,
    cross_entropy,
    descend,
    follow,
    grad,
    in_ball,
    in_range,
    network,
    one_hot,
)

import bilevel_at as ba
from bilevel_at.problems import nuat
from bilevel_at.solvers import ZeroIG


def nuclear(change):
    """The sum of the singular values, as the trace of (DᵀD)^½."""
    return torch.linalg.eigvalsh(change.T @ change).clamp(min=0).sqrt().sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("epoch", [0, 40, 95])
def test_the_published_step(epoch, alternate, smoothing):
    model, twin = network(), network()
    problem = nuat.problem(EPS, divisor=5, alternate=alternate, label_smoothing=smoothing)
    problem.set_epoch(epoch, 100)
    follow(problem, model, 3)

    generator, lam = torch.Generator().manual_seed(7), 4.5 * min(epoch / 90, 1)
    for number, batch in enumerate(batches(3)):
        x, targets = batch.x, one_hot(batch.y, 1 - smoothing + smoothing / CLASSES, smoothing / CLASSES)
        reference = twin(x).detach()
        z = in_range(corner(x, EPS / 2, generator), x).requires_grad_()
        twin.eval()
        output = twin(x + z)
        total = cross_entropy(output, targets).sum()
        if number % 2 or not alternate:
            total = total + lam * nuclear(reference - output)
        delta = in_ball(z.detach() + EPS * grad(total, z).sign(), x)
        twin.train()
        moved = twin(x + delta)
        clean = twin(x)
        loss = cross_entropy(clean, targets).mean()
        descend(twin, loss + lam * nuclear(clean - moved) / 5 if lam else loss)
    assert_same(model, twin)


def test_the_weight_is_shared_and_told_the_epoch_once():
    problem = nuat.problem(EPS)
    schedules = [p for p in ba.policies(problem).values() if isinstance(p, ba.Schedule)]
    assert len(schedules) == 1 and schedules[0] is problem.upper.weight
    for epoch, weight in ((0, 0.0), (30, 1.5), (90, 4.5), (99, 4.5)):
        problem.set_epoch(epoch, 100)
        assert problem.upper.weight.value == pytest.approx(weight)
    constant = nuat.problem(EPS, weight=2.0, rise=0.0)
    assert constant.upper.weight.value == 2.0


def test_the_gradient_is_finite_where_the_attack_changes_nothing():
    model = network().eval()
    problem = nuat.problem(1e-9, rise=0.0)
    problem.lower = ba.AtAnchor(ba.LinfBall(EPS), "zero")
    step = ZeroIG().hypergradient(problem, model, next(batches(1)))
    assert step.losses.ndim == 0
    assert all(g is None or g.isfinite().all() for g in step.grads.values())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"weight": -1.0}, "weight is -1; it must be a finite number, at least 0"),
        ({"rise": 1.5}, "rise is 1.5; it must be a share of the epochs, from 0 to 1"),
        ({"divisor": 0.0}, "divisor is 0; it must be a positive finite number"),
    ],
)
def test_arguments_out_of_range(arguments, line):
    with pytest.raises(ba.InputError, match=line):
        nuat.problem(EPS, **arguments)
