"""Smooth BETA: Algorithm 3 and equation 34."""

from __future__ import annotations

import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transcriptions import (
    F64,
    assert_same,
    beta_rates,
    beta_starts,
    beta_steps,
    descend_on,
    library_step,
    norm,
    rmsprop_margins,
    scenes,
    seeded,
    steep_network,
)

from bilevel_at.problems import smooth_beta
from bilevel_at.solvers import ZeroIG
from bilevel_at.testing import strategies as bst


def smooth_loss(model, x, y, attacks, mu, hold=False):
    """Line 9 of Algorithm 3, meaned over the batch; ``hold`` keeps the weights constant."""
    loss = torch.zeros((), dtype=F64)
    for i, row in enumerate(attacks):
        powers, losses = [], []
        for eta, _, j in row:
            out = model(x[i : i + 1] + eta)[0]
            power = torch.exp(mu * (out[j] - out[y[i]]))
            powers.append(power.detach() if hold else power)
            losses.append(out.logsumexp(0) - out[y[i]])
        weights = torch.stack(powers) / sum(powers)
        loss = loss + (weights * torch.stack(losses)).sum() / len(x)
    return loss


@examples(0.3)
@given(s=scenes(max_size=3), steps=beta_steps, rate=beta_rates, mu=st.floats(0.1, 5.0))
def test_smooth_beta(s, steps, rate, mu):
    """Equation 34: weights e^{μM_j} / Σ e^{μM_j}, differentiated with the losses they multiply."""
    problem = smooth_beta.problem(s.epsilon, steps, rate, temperature=mu)
    library_step(problem, smooth_beta.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    attacks = rmsprop_margins(s.twin, s.x, s.y, beta_starts(s), steps, rate, s.epsilon)

    descend_on(s.twin, smooth_loss(s.twin, s.x, s.y, attacks, mu), s.lr)
    assert_same(s.model, s.twin, rtol=1e-8, atol=1e-10)


def test_smooth_beta_differentiates_its_weights():
    """So that the test above would notice if it did not."""
    model, batch = steep_network()
    attacks = rmsprop_margins(model, batch.x, batch.y, torch.zeros(12, 8, dtype=F64), 3, 0.02, 0.2)
    whole, constant = (
        torch.autograd.grad(smooth_loss(model, batch.x, batch.y, attacks, 1.0, hold), list(model.parameters()))
        for hold in (False, True)
    )
    assert norm([a - b for a, b in zip(whole, constant, strict=True)]) > 0.05 * norm(whole)


@examples(0.3)
@given(data=st.data())
def test_smooth_beta_is_algorithm_3(data):
    shape, classes = data.draw(bst.shapes(8)), data.draw(st.integers(2, 4))
    model = data.draw(bst.smooth_models(shape, classes))
    batch = data.draw(bst.batches(shape, classes))
    mu = data.draw(st.floats(0.1, 5.0))
    problem = smooth_beta.problem(epsilon=0.2, steps=2, step=0.1, temperature=mu)
    step = ZeroIG().hypergradient(problem, model, batch, generator=torch.Generator().manual_seed(0))

    each = classes - 1
    eta = step.solution.delta.reshape(len(batch), each, *shape)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(batch)):
        others = [j for j in range(classes) if j != batch.y[i]]
        terms, scores = [], []
        for k, j in enumerate(others):
            out = model((batch.x[i] + eta[i, k])[None])[0]
            scores.append(mu * (out[j] - out[batch.y[i]]))
            terms.append(F.cross_entropy(out[None], batch.y[i : i + 1]))
        weights = torch.softmax(torch.stack(scores), 0)  # gradients go through the weights
        total = total + (weights * torch.stack(terms)).sum() / len(batch)
    expected = torch.autograd.grad(total, list(model.parameters()))
    torch.testing.assert_close(step.loss, total.detach())
    for got, want in zip(step.grads.values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)
