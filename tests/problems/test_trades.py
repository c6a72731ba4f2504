"""TRADES."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from transcriptions import (
    assert_same,
    ce,
    clip,
    descend_on,
    gaussian_start,
    input_gradient,
    kl,
    library_step,
    scenes,
    seeded,
)

from bilevel_at.problems import standard, trades


@pytest.mark.parametrize("clipped", [False, True])
@examples(0.3)
@given(s=scenes(kinks=True), steps=st.integers(1, 3), weight=st.floats(0.1, 8.0))
def test_trades(clipped, s, steps, weight):
    """ℓ(x) + weight · KL(f(x) ‖ f(x + δ*)) with gradients through both arguments; δ* by sign steps up the KL."""
    problem = trades.problem(s.epsilon, weight, steps, **({"clip_start": True} if clipped else {}))
    taken = library_step(problem, trades.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    delta, reference = gaussian_start(s, clipped), s.twin(s.x).detach()
    if steps == 1:
        torch.testing.assert_close(taken.solution.anchor, delta, rtol=1e-12, atol=1e-15)
    for _ in range(steps):
        gradient = input_gradient(lambda at: kl(reference, s.twin(at)), s.x + delta)
        delta = clip(delta + s.epsilon / 4 * gradient.sign(), s.x, s.epsilon)
    torch.testing.assert_close(taken.solution.delta, delta, rtol=1e-12, atol=1e-14)
    loss = ce(s.twin, s.x, s.y) + weight * kl(s.twin(s.x), s.twin(s.x + delta))
    descend_on(s.twin, loss.mean(), s.lr)
    assert_same(s.model, s.twin)


@examples(0.3)
@given(s=scenes(kinks=True))
def test_trades_at_weight_0_is_standard_training(s):
    library_step(trades.problem(s.epsilon, weight=0.0, steps=2), trades.solver(), s.model, s.batch, s.lr, seeded(0))
    library_step(standard.problem(s.epsilon), standard.solver(), s.twin, s.batch, s.lr)
    assert all(torch.equal(p, q) for p, q in zip(s.model.parameters(), s.twin.parameters(), strict=True))
