"""Fast-AT, equations 5 to 7 of the Fast-BAT paper."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import given
from networks import network
from transcriptions import (
    STARTS,
    assert_same,
    ce,
    ce_gradient,
    descend_on,
    drawing,
    library_step,
    scenes,
    seeded,
    sign_step,
)

import bilevel_at as ba
from bilevel_at.problems import fastat


@pytest.mark.parametrize("draw", STARTS)
@examples(0.3)
@given(s=scenes(kinks=True))
def test_fast_at(draw, s):
    """Fast-BAT paper, equations 5 to 7, with the published step 1.25 ε."""
    problem = fastat.problem(s.epsilon, **drawing(draw))
    step = library_step(problem, fastat.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    z = STARTS[draw](s.x, s.epsilon, seeded(s.seed))
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
    z = torch.clamp(0.1 * (2 * z - 1), -x, 1 - x)  # in the cube, then clipped to the input range
    low, high = torch.clamp(-x, min=-0.1), torch.clamp(1 - x, max=0.1)
    expected = torch.clamp(z + 0.125 * ce_gradient(model, x + z, y).sign(), low, high)
    torch.testing.assert_close(solution.delta, expected)
    assert ((z >= low) & (z <= high)).all() and torch.allclose(solution.anchor, z)
