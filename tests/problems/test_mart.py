"""MART."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from transcriptions import assert_same, descend_on, gaussian_start, kl, library_step, scenes, seeded, sign_step

from bilevel_at.problems import mart


def boosted(p, y):
    """BCE: −log p_y − log(1 − max_{k≠y} p_k)."""
    own = p.gather(1, y[:, None])[:, 0]
    rival = torch.stack([torch.cat([row[:j], row[j + 1 :]]).max() for row, j in zip(p, y.tolist(), strict=True)])
    return -own.log() - (1 - rival).log()


@pytest.mark.parametrize("weight", [0.0, 5.0, None])
@examples(0.3)
@given(s=scenes(kinks=True), steps=st.integers(1, 3), drawn=st.floats(0.1, 8.0))
def test_mart(weight, s, steps, drawn):
    """BCE(x + δ*) + weight · KL(p(x) ‖ p(x + δ*)) · (1 − p_y(x)); at weight 0 BCE alone."""
    weight = drawn if weight is None else weight
    problem = mart.problem(s.epsilon, weight, steps)
    taken = library_step(problem, mart.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    delta = gaussian_start(s)
    for _ in range(steps):
        delta = sign_step(s.twin, s.x, s.y, delta, s.epsilon / 4, s.epsilon)
    torch.testing.assert_close(taken.solution.delta, delta, rtol=1e-12, atol=1e-14)
    clean, moved = s.twin(s.x), s.twin(s.x + delta)
    loss = boosted(moved.softmax(1), s.y)
    if weight:
        loss = loss + weight * kl(clean, moved) * (1 - clean.softmax(1).gather(1, s.y[:, None])[:, 0])
    torch.testing.assert_close(taken.losses, loss.detach(), rtol=1e-9, atol=1e-12)
    descend_on(s.twin, loss.mean(), s.lr)
    assert_same(s.model, s.twin, rtol=1e-8, atol=1e-10)
