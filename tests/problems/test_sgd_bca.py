"""SGD_BCA."""

from __future__ import annotations

from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from transcriptions import ce_gradient, clip, play, visits

from bilevel_at.problems import sgd_bca


@examples(0.3)
@given(v=visits(), step=st.floats(0.05, 3.0))
def test_sgd_bca(v, step):
    """x_k ← Π(x_k + η_x ∇ℓ): ATTA without the sign (ATAS paper, section IV)."""

    def update(memory, batch, epoch):
        z = memory.start(batch)
        delta = clip(z + step * ce_gradient(v.twin, batch.x + z, batch.y), batch.x, v.epsilon)
        memory.store(batch, delta)
        return delta

    play(v, sgd_bca.problem(v.epsilon, step), sgd_bca.solver(), update)
