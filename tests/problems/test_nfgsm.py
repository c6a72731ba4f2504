"""N-FGSM: noise wider than the ball, one sign step, the input range alone."""

from __future__ import annotations

import pytest
import torch
from plain_loops import (
    EPS,
    assert_same,
    batches,
    cross_entropy,
    descend,
    follow,
    grad,
    in_ball,
    in_range,
    network,
    noise,
    one_hot,
)

import bilevel_at as ba
from bilevel_at.problems import fgsm_sdi, nfgsm
from bilevel_at.solvers import ZeroIG


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_the_published_step(clip, smoothing):
    model, twin = network(), network()
    problem = nfgsm.problem(EPS, noise=1.5, step=0.7 * EPS, clip=clip, label_smoothing=smoothing)
    follow(problem, model)

    generator = torch.Generator().manual_seed(7)
    for batch in batches(3):
        x, targets = batch.x, one_hot(batch.y, 1 - smoothing + smoothing / 3, smoothing / 3)
        eta = in_range(noise(x, 1.5 * EPS, generator), x).requires_grad_()
        slope = grad(cross_entropy(twin(x + eta), targets).sum(), eta)
        delta = (eta.detach()) + 0.7 * EPS * slope.sign()
        delta = in_range(delta, x) if clip is None else in_ball(delta, x)
        descend(twin, cross_entropy(twin(x + delta), targets).mean())
    assert_same(model, twin)


def test_training_leaves_the_ball_that_the_network_is_to_withstand():
    model, batch = network(), next(batches(1))
    problem = nfgsm.problem(EPS)
    delta = ZeroIG().hypergradient(problem, model, batch, generator=torch.Generator().manual_seed(7)).solution.delta
    assert 2 * EPS < delta.abs().max() <= 3 * EPS
    assert (batch.x + delta).min() >= 0
    assert (batch.x + delta).max() <= 1
    assert problem.threat.epsilon == EPS
    assert nfgsm.problem(EPS, clip=2.0).lower.constraint == ba.LinfBall(2 * EPS)


@pytest.mark.parametrize("name", ["noise", "clip"])
def test_bad_arguments(name):
    with pytest.raises(ba.InputError, match=f"{name} is -1; it must be a finite number, at least 0"):
        nfgsm.problem(EPS, **{name: -1})


def test_a_bad_epsilon_is_called_epsilon():
    for file in (nfgsm, fgsm_sdi):
        with pytest.raises(ba.InputError, match="epsilon is -1; it must be a finite number, at least 0"):
            file.problem(epsilon=-1)
