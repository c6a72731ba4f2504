"""GAT: NuAT's attacker with the squared distance of the probabilities, per sample."""

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
from bilevel_at.problems import gat
from bilevel_at.solvers import ZeroIG


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize(("epoch", "lam"), [(0, 10.0), (85, 10.0), (86, 40.0)])
def test_the_published_step(epoch, lam, alternate, smoothing):
    model, twin = network(), network()
    problem = gat.problem(EPS, alternate=alternate, label_smoothing=smoothing)
    problem.set_epoch(epoch, 100)
    follow(problem, model, 3)

    generator = torch.Generator().manual_seed(7)
    for number, batch in enumerate(batches(3)):
        x, targets = batch.x, one_hot(batch.y, 1 - smoothing + smoothing / CLASSES, smoothing / CLASSES)
        reference = twin(x).detach().softmax(1)
        z = in_range(corner(x, EPS / 2, generator), x).requires_grad_()
        twin.eval()
        output = twin(x + z)
        total = cross_entropy(output, targets).mean()
        if number % 2 or not alternate:
            total = total + lam * ((reference - output.softmax(1)) ** 2).sum() / len(x)
        delta = in_ball(z.detach() + EPS * grad(total, z).sign(), x)
        twin.train()
        moved = twin(x + delta)
        clean = twin(x)
        distance = ((clean.softmax(1) - moved.softmax(1)) ** 2).sum(1)
        descend(twin, (cross_entropy(clean, targets) + lam * distance).mean())
    assert_same(model, twin)


def test_the_loss_is_per_sample():
    step = ZeroIG().hypergradient(gat.problem(EPS), network(), next(batches(1)))
    assert step.losses.shape == (5,)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"weight": -1.0}, "weight is -1; it must be a finite number, at least 0"),
        ({"late_factor": -1.0}, "late_factor is -1; it must be a finite number, at least 0"),
        ({"late": 1.5}, "late is 1.5; it must be a share of the epochs, from 0 to 1"),
    ],
)
def test_arguments_out_of_range(arguments, line):
    with pytest.raises(ba.InputError, match=line):
        gat.problem(EPS, **arguments)
