"""Standard training."""

from __future__ import annotations

from examples import examples
from hypothesis import given
from transcriptions import assert_same, ce, descend_on, library_step, scenes

from bilevel_at.problems import standard


@examples(0.3)
@given(s=scenes(kinks=True))
def test_standard(s):
    step = library_step(standard.problem(s.epsilon), standard.solver(), s.model, s.batch, s.lr)
    descend_on(s.twin, ce(s.twin, s.x, s.y).mean(), s.lr)
    assert_same(s.model, s.twin)
    assert not step.solution.delta.any()
