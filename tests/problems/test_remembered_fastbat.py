"""Fast-BAT with remembered anchors and adaptive steps."""

from __future__ import annotations

import torch
from examples import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from transcriptions import (
    Memory,
    assert_same,
    bat_terms,
    bat_weights,
    by_sample,
    ce_gradient,
    descend,
    library_step,
    norm,
    seeded,
    total,
    visits,
)

from bilevel_at.problems import remembered_fastbat


@examples(0.3)
@given(v=visits(n=4), c=st.floats(0.1, 2.0), momentum=st.floats(0.0, 0.9), top=st.floats(0.1, 0.6), weight=bat_weights)
def test_remembered_fastbat(v, c, momentum, top, weight):
    """Its docstring's three lines over two visits: 1/λ_i = γ/(c + √v_i), and λ_i a constant of the solve."""
    problem = remembered_fastbat.problem(v.epsilon, top, c, momentum)
    solver = remembered_fastbat.solver("hessian-free-kkt", v.epsilon, top, ig_factor=weight * top)
    generator = seeded(v.seed + 1)
    memory = Memory(len(v.x), v.epsilon, seeded(v.seed + 1))
    counted = 0
    for _, index in v.epochs(2):
        batch = v.batch(index)
        taken = library_step(problem, solver, v.model, batch, v.lr, generator)
        z = memory.start(batch)
        followed = memory.follow(index, ce_gradient(v.twin, batch.x + z, batch.y), momentum)
        inverse = top * c / (c + followed.sqrt())
        terms = bat_terms(v.twin, batch.x, batch.y, z, inverse, v.epsilon)
        memory.store(batch, terms.delta)
        torch.testing.assert_close(taken.solution.delta, terms.delta, rtol=1e-9, atol=1e-12)
        cross = terms.cross(by_sample(inverse, z) * (terms.free * terms.v))
        counted += weight * norm(cross) > 1e-3 * norm(terms.direct)
        descend(v.twin, total(terms.direct, cross, weight), v.lr)
        assert_same(v.model, v.twin)
    assume(counted)  # the implicit term was seen at least once
