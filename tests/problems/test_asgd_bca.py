"""A-SGD_BCA, whose v̂ never decreases."""

from __future__ import annotations

import torch
from examples import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from transcriptions import by_sample, ce_gradient, clip, play, seeded, steep_network, visits

from bilevel_at.problems import asgd_bca
from bilevel_at.testing import strategies as bst


@examples(0.3)
@given(v=visits(), eta=st.floats(0.01, 1.0), momentum=st.floats(0.0, 0.9))
def test_asgd_bca(v, eta, momentum):
    """x_k ← Π(x_k + η_x/√v̂_k · ∇ℓ), v̂ never decreasing."""
    record = []

    def update(memory, batch, epoch):
        z = memory.start(batch)
        gradient = ce_gradient(v.twin, batch.x + z, batch.y)
        memory.follow(batch.index, gradient, momentum)
        record.append(memory.largest.clone())
        length = eta / (memory.largest[batch.index].sqrt() + 1e-12)  # so that a gradient of zero has a step
        delta = clip(z + by_sample(length, z) * gradient, batch.x, v.epsilon)
        memory.store(batch, delta)
        return delta

    problem = asgd_bca.problem(v.epsilon, eta, momentum)
    memory = play(v, problem, asgd_bca.solver(), update, rtol=1e-7, atol=1e-8)
    n = len(v.x)
    torch.testing.assert_close(problem.lower.step.largest.values[:n], memory.largest, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(problem.lower.step.memory.values[:n], memory.v, rtol=1e-6, atol=1e-9)
    assert all((later >= earlier).all() for earlier, later in zip(record, record[1:], strict=False))


@examples(0.3)
@given(seed=bst.seeds, momentum=st.floats(0.0, 0.8), shrink=st.floats(0.1, 0.5))
def test_asgd_bca_divides_by_the_largest_v(seed, momentum, shrink):
    """Where gradients shrink v̂ stays and v falls: the second step is shorter than ATAS' preconditioner has it."""
    model, batch = steep_network(seed % 1000)
    batch = batch.replace(x=0.3 + 0.4 * batch.x)  # clear of the input range: the ball alone could cut a step short
    epsilon, eta = 0.25, 0.02
    problem = asgd_bca.problem(epsilon, eta, momentum)
    first = asgd_bca.solver().backward(problem, model, batch, generator=seeded(seed)).solution
    g1 = ce_gradient(model, batch.x + first.anchor, batch.y)
    with torch.no_grad():
        model[-1].weight *= shrink
        model[-1].bias *= shrink
    second = problem.lower.solve(model, batch, generator=seeded(seed))
    z = first.delta
    g2 = ce_gradient(model, batch.x + z, batch.y)
    n1, n2 = g1.norm(dim=1), g2.norm(dim=1)
    v1 = (1 - momentum) * n1**2
    v2 = momentum * v1 + (1 - momentum) * n2**2
    fallen = v2 < 0.9 * v1
    assume(fallen.any())
    largest = torch.maximum(v1, v2)
    with_hat = clip(z + eta * g2 / largest.sqrt()[:, None], batch.x, epsilon)
    without = clip(z + eta * g2 / v2.sqrt()[:, None], batch.x, epsilon)
    torch.testing.assert_close(second.delta, with_hat, rtol=1e-9, atol=1e-13)
    assert ((with_hat - without)[fallen].abs().amax(1) > 1e-6).any()
