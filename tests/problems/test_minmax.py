"""PGD training (Madry et al.)."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from networks import network
from transcriptions import (
    STARTS,
    assert_same,
    ce,
    ce_gradient,
    cube_start,
    descend_on,
    drawing,
    library_step,
    scenes,
    seeded,
    sign_step,
)

import bilevel_at as ba
from bilevel_at.problems import minmax


@pytest.mark.parametrize("draw", STARTS)
@examples(0.3)
@given(s=scenes(kinks=True), steps=st.integers(1, 4), factor=st.one_of(st.none(), st.floats(0.1, 1.5)))
def test_pgd(draw, s, steps, factor):
    """Madry's update: K projected sign steps from a uniform draw, δ* then a constant."""
    length = s.epsilon / 4 if factor is None else factor * s.epsilon
    problem = minmax.problem(s.epsilon, steps, None if factor is None else length, **drawing(draw))
    step = library_step(problem, minmax.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    delta = STARTS[draw](s.x, s.epsilon, seeded(s.seed))
    for _ in range(steps):
        delta = sign_step(s.twin, s.x, s.y, delta, length, s.epsilon)
    torch.testing.assert_close(step.solution.delta, delta, rtol=1e-12, atol=1e-14)
    descend_on(s.twin, ce(s.twin, s.x + delta, s.y).mean(), s.lr)
    assert_same(s.model, s.twin)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_pgd_is_k_sign_steps(steps):
    model, x, y = network()
    problem = minmax.problem(epsilon=0.1, steps=steps, step=0.03)
    solution = problem.lower.solve(model, ba.Batch(x, y), generator=torch.Generator().manual_seed(1))
    low, high = torch.clamp(-x, min=-0.1), torch.clamp(1 - x, max=0.1)
    delta = cube_start(x, 0.1, torch.Generator().manual_seed(1))
    for _ in range(steps):
        delta = torch.clamp(delta + 0.03 * ce_gradient(model, x + delta, y).sign(), low, high)
    torch.testing.assert_close(solution.delta, delta)
