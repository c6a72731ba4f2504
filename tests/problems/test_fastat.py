"""Fast-AT, equations 5 to 7 of the Fast-BAT paper."""

from __future__ import annotations

import torch
from examples import examples
from hypothesis import given
from networks import network
from transcriptions import (
    assert_same,
    ce,
    ce_gradient,
    descend_on,
    library_step,
    scenes,
    seeded,
    sign_step,
    uniform_start,
)

import bilevel_at as ba
from bilevel_at.problems import fastat


@examples(0.3)
@given(s=scenes(kinks=True))
def test_fast_at(s):
    """Fast-BAT paper, equations 5 to 7, with the published step 1.25 ε."""
    step = library_step(fastat.problem(s.epsilon), fastat.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    z = uniform_start(s.x, s.epsilon, seeded(s.seed))
    delta = sign_step(s.twin, s.x, s.y, z, 1.25 * s.epsilon, s.epsilon)
    torch.testing.assert_close(step.solution.delta, delta, rtol=1e-12, atol=1e-14)
    descend_on(s.twin, ce(s.twin, s.x + delta, s.y).mean(), s.lr)
    assert_same(s.model, s.twin)
    assert step.implicit_norm == 0


def test_fast_at_is_one_sign_step_from_a_uniform_draw():
    model, x, y = network()
    problem = fastat.problem(epsilon=0.1)
    solution = problem.lower.solve(model, ba.Batch(x, y), generator=torch.Generator().manual_seed(1))
    z = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    low, high = torch.clamp(-x, min=-0.1), torch.clamp(1 - x, max=0.1)
    z = low + z * (high - low)
    expected = torch.clamp(z + 0.125 * ce_gradient(model, x + z, y).sign(), low, high)
    torch.testing.assert_close(solution.delta, expected)
    assert ((z >= low) & (z <= high)).all() and torch.allclose(solution.anchor, z)
