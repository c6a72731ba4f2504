"""FGSM and its starts."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from transcriptions import STARTS, assert_same, box, ce, descend_on, drawing, library_step, scenes, seeded, sign_step

from bilevel_at.problems import fgsm


@pytest.mark.parametrize("start", ["zero", "uniform", "uniform in the set", "corner"])
@examples(0.3)
@given(s=scenes(kinks=True), factor=st.one_of(st.none(), st.floats(0.1, 3.0)))
def test_fgsm(start, s, factor):
    """θ ← θ − lr ∇ mean ℓ(θ, P_C(z − step · sign ∇ℓ_atk)); step ε unless it is given."""
    length = s.epsilon if factor is None else factor * s.epsilon
    draw = "set" if start == "uniform in the set" else "cube"
    start = start.removesuffix(" in the set")
    problem = fgsm.problem(s.epsilon, start, None if factor is None else length, **drawing(draw))
    step = library_step(problem, fgsm.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    low, high = box(s.x, s.epsilon)
    if start == "zero":
        z = torch.zeros_like(s.x)
    elif start == "uniform":
        z = STARTS[draw](s.x, s.epsilon, seeded(s.seed))
    else:
        z = step.solution.anchor
        assert ((z == low) | (z == high)).all()  # {−ε, ε}^d, cut to the input range
    torch.testing.assert_close(step.solution.anchor, z, rtol=1e-12, atol=1e-15)
    delta = sign_step(s.twin, s.x, s.y, z, length, s.epsilon)
    torch.testing.assert_close(step.solution.delta, delta, rtol=1e-12, atol=1e-14)
    descend_on(s.twin, ce(s.twin, s.x + delta, s.y).mean(), s.lr)
    assert_same(s.model, s.twin)
