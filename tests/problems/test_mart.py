"""MART: its loss, with and without the constants of the authors' code, and the order of its passes."""

from __future__ import annotations

import copy

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from transcriptions import F64, assert_same, descend_on, gaussian_start, library_step, scenes, seeded, sign_step

import bilevel_at as ba
from bilevel_at.problems import mart


def mart_loss(clean, moved, y, weight, exact):
    """BCE(x + δ) + weight · KL(p(x) ‖ p(x + δ)) · (1 − p_y(x)) per sample, from logits; at weight 0 BCE alone.

    BCE is −log p_y − log(1 − max_{k≠y} p_k). Where not ``exact``, with the constants of the authors' code.
    """
    a, b, c = (0.0, 0.0, 0.0) if exact else (1e-4 + 1e-12, 1e-12, 1e-7)
    p, q, label = clean.softmax(1), moved.softmax(1), y[:, None]
    rival = torch.stack([torch.cat([row[:j], row[j + 1 :]]).max() for row, j in zip(q, y.tolist(), strict=True)])
    boosted = -q.gather(1, label)[:, 0].log() - (1 + a - rival).log()
    divergence = (p * (p.log() - (q + b).log())).sum(1)
    return boosted + weight * divergence * (1 + c - p.gather(1, label)[:, 0]) if weight else boosted


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("weight", [0.0, 5.0, None])
@examples(0.3)
@given(s=scenes(kinks=True), steps=st.integers(1, 3), drawn=st.floats(0.1, 8.0), clipped=st.booleans())
def test_mart(weight, exact, s, steps, drawn, clipped):
    weight = drawn if weight is None else weight
    options = {name: True for name, value in (("exact", exact), ("clip_start", clipped)) if value}
    problem = mart.problem(s.epsilon, weight, steps, **options)
    taken = library_step(problem, mart.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    delta = gaussian_start(s, clipped)
    if steps == 1:
        torch.testing.assert_close(taken.solution.anchor, delta, rtol=1e-12, atol=1e-15)
    for _ in range(steps):
        delta = sign_step(s.twin, s.x, s.y, delta, s.epsilon / 4, s.epsilon)
    torch.testing.assert_close(taken.solution.delta, delta, rtol=1e-12, atol=1e-14)
    loss = mart_loss(s.twin(s.x), s.twin(s.x + delta), s.y, weight, exact)
    torch.testing.assert_close(taken.losses, loss.detach(), rtol=1e-9, atol=1e-12)
    descend_on(s.twin, loss.mean(), s.lr)
    assert_same(s.model, s.twin, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("clean_first", [True, False])
def test_the_order_of_the_passes_is_that_of_the_running_statistics(clean_first):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 3)]
    model = torch.nn.Sequential(*layers).double()
    twin = copy.deepcopy(model)
    x, y = torch.rand(7, 6, dtype=F64), torch.randint(0, 3, (7,))
    options = {} if clean_first else {"clean_first": False}
    step = mart.solver().backward(mart.problem(0.2, steps=2, **options), model, ba.Batch(x, y), seeded(1))
    for at in (x, x + step.solution.delta) if clean_first else (x + step.solution.delta, x):
        twin(at)
    for got, expected in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, expected)
    assert not torch.equal(twin[1].running_mean, torch.zeros(8, dtype=F64))
