"""TDAT: starts from the batch before, targets that soften by epoch."""

from __future__ import annotations

import math

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
    network,
    one_hot,
)

import bilevel_at as ba
from bilevel_at.problems import tdat
from bilevel_at.solvers import ZeroIG


def transcription(twin, seen, gamma, step=EPS, weight=0.65, share=0.0):
    """The starts that are left, by position."""
    generator, starts = torch.Generator().manual_seed(7), {}
    for batch in seen:
        x, y = batch.x, batch.y
        attack = one_hot(y, gamma, (1 - gamma) / (CLASSES - 1))
        training = one_hot(y, gamma + (1 - gamma) / CLASSES, (1 - gamma) / CLASSES)
        corners = corner(x, EPS, generator)
        z = torch.stack([starts.get(i, corners[i]) for i in range(len(x))]).requires_grad_()
        reference = twin(x + z)
        slope = grad(cross_entropy(reference, attack).sum(), z)
        delta = in_ball(z.detach() + step * slope.sign(), x)
        output = twin(x + delta)
        p_y = (reference.exp() / reference.exp().sum(1, keepdim=True))[torch.arange(len(x)), y]
        relation = (reference - output).square().sum(1) * torch.tanh(1.0000001 - p_y)
        descend(twin, (cross_entropy(output, training) + weight * relation).mean())
        for i in range(len(x)):
            starts[i] = share * z[i].detach() + (1 - share) * delta[i]
    return starts


@pytest.mark.parametrize(
    ("epoch", "arguments", "settings"),
    [
        (0, {}, {}),
        (40, {}, {}),
        (100, {"weight": 0.6, "step": 0.7 * EPS}, {"weight": 0.6, "step": 0.7 * EPS}),
        (40, {"batch_momentum": 0.75}, {"share": 0.75}),
    ],
)
def test_the_published_step_with_its_memory(epoch, arguments, settings):
    model, twin = network(), network()
    problem = tdat.problem(EPS, **arguments)
    problem.set_epoch(epoch, 110)
    follow(problem, model, 4)
    gamma = max(0.15, 0.6 * math.tan(1 - epoch / 110))
    starts = transcription(twin, batches(4), gamma, **settings)
    assert_same(model, twin)
    for i, start in starts.items():
        torch.testing.assert_close(problem.lower.anchor.memory.values[i], start, rtol=1e-11, atol=1e-13)


def test_smoothing_that_is_the_same_in_every_epoch():
    model, twin = network(), network()
    problem = tdat.problem(EPS, label_smoothing=0.3)
    problem.set_epoch(100, 110)
    follow(problem, model, 3)
    transcription(twin, batches(3), 0.7)
    assert_same(model, twin)


def test_the_share_of_the_label_falls_to_its_least():
    shares = [tdat.label_share(epoch, 110) for epoch in range(110)]
    assert shares == sorted(shares, reverse=True)
    assert all(0.15 <= share <= 1 for share in shares)
    assert shares[0] == pytest.approx(0.6 * math.tan(1))
    assert shares[-1] == 0.15


def test_a_smaller_batch_takes_the_first_positions():
    """And leaves the others as they were."""
    model, problem = network(), tdat.problem(EPS)
    large, small = next(batches(1)), next(batches(1, size=2))
    ZeroIG().backward(problem, model, large)
    before = problem.lower.anchor.memory.values.clone()
    step = ZeroIG().backward(problem, model, small)
    assert torch.equal(step.solution.anchor, before[:2])
    after = problem.lower.anchor.memory.values
    assert torch.equal(after[2:], before[2:])
    assert torch.equal(after[:2], step.solution.delta)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1}, "weight is -1; it must be a finite number, at least 0"),
        ({"batch_momentum": 2.0}, "batch_momentum is 2; it must be from 0 to 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ba.InputError, match=message):
        tdat.problem(EPS, **arguments)
