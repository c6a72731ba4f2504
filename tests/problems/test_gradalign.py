"""GradAlign: its loss and gradient, samples without a gradient, its published coefficients."""

from __future__ import annotations

import copy

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from transcriptions import (
    F64,
    STARTS,
    Scene,
    assert_same,
    ce,
    ce_gradient,
    descend_on,
    drawing,
    library_step,
    norm,
    scenes,
    seeded,
    sign_step,
    steep_network,
    uniform_noise,
)

import bilevel_at as ba
from bilevel_at.problems import gradalign
from bilevel_at.testing import hypergradcheck
from bilevel_at.testing import strategies as bst


def gradalign_loss(model, x, y, delta, eta, coefficient, clean=None):
    """mean ℓ(δ*) + coefficient · Ω, Ω = 1 − cos averaged over the samples where both gradients are not zero.

    ``clean`` holds ∇_x ℓ(x) constant; without it θ moves both gradients (equation 7).
    """

    def gradient(at):
        at = at.detach().requires_grad_()
        return torch.autograd.grad(ce(model, at, y).sum(), at, create_graph=True)[0].flatten(1)

    first = gradient(x) if clean is None else clean.flatten(1)
    second = gradient(x + eta)
    terms = [
        1 - (a / a.norm() * (b / b.norm())).sum()
        for a, b in zip(first, second, strict=True)
        if a.norm() > 0 and b.norm() > 0
    ]
    loss = ce(model, x + delta, y).mean()
    return loss + coefficient * torch.stack(terms).mean() if terms else loss


def gradalign_by_hand(s, steps, start, detach, coefficient, draw="cube"):
    """δ* and the loss, with the draws in the order anchor, η; from zero the anchor draws nothing."""
    generator = seeded(s.seed)
    delta = torch.zeros_like(s.x) if start == "zero" else STARTS[draw](s.x, s.epsilon, generator)
    for _ in range(steps):
        delta = sign_step(s.twin, s.x, s.y, delta, (1.25 if steps == 1 else 0.5) * s.epsilon, s.epsilon)
    eta = uniform_noise(s.x.shape, s.epsilon, generator)
    clean = ce_gradient(s.twin, s.x, s.y) if detach else None
    return delta, gradalign_loss(s.twin, s.x, s.y, delta, eta, coefficient, clean)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(
    ("steps", "start", "draw"),
    [(1, "zero", "cube"), (1, "uniform", "cube"), (1, "uniform", "set"), (2, "zero", "cube"), (2, "uniform", "cube")],
)
@examples(0.3)
@given(s=scenes(), coefficient=st.floats(0.05, 5.0))
def test_gradalign(steps, start, draw, detach, s, coefficient):
    problem = gradalign.problem(s.epsilon, coefficient, steps, start, detach=detach, **drawing(draw))
    taken = library_step(problem, gradalign.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    delta, loss = gradalign_by_hand(s, steps, start, detach, coefficient, draw)
    torch.testing.assert_close(taken.solution.delta, delta, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(taken.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    descend_on(s.twin, loss, s.lr)
    # Near cos = 1 the distance is a difference of nearly equal numbers, and so is its gradient.
    assert_same(s.model, s.twin, rtol=1e-8, atol=1e-10)


def partly_dead_network(seed, classes=3, d=6):
    """A ReLU network that is flat around x = 0 and active where inputs exceed a half."""
    g = seeded(seed)
    hidden = torch.nn.Linear(d, 7).double()
    out = torch.nn.Linear(7, classes).double()
    with torch.no_grad():
        weight = torch.rand(7, d, generator=g, dtype=F64) + 0.1
        hidden.weight.copy_(weight / weight.sum(1, keepdim=True))
        hidden.bias.fill_(-0.4)
        out.weight.copy_(torch.randn(classes, 7, generator=g, dtype=F64))
    return torch.nn.Sequential(hidden, torch.nn.ReLU(), out)


@pytest.mark.parametrize("detach", [True, False])
@examples(0.3)
@given(seed=bst.seeds, dead=st.integers(1, 3), alive=st.integers(0, 3), lr=st.floats(0.01, 1.0))
def test_gradalign_leaves_out_samples_without_a_gradient(detach, seed, dead, alive, lr):
    """Their cosine is undefined; the mean is over the others, and every gradient is finite."""
    model = partly_dead_network(seed)
    g = seeded(seed + 1)
    x = torch.cat([torch.zeros(dead, 6, dtype=F64), 0.8 + 0.2 * torch.rand(alive, 6, generator=g, dtype=F64)])
    y = torch.randint(0, 3, (dead + alive,), generator=g)
    s = Scene(model, copy.deepcopy(model), ba.Batch(x, y), 3, 0.2, lr, seed)
    zero = (ce_gradient(model, x, y) == 0).all(1)
    assert zero[:dead].all() and not zero[dead:].any()
    problem = gradalign.problem(s.epsilon, 2.0, detach=detach)
    taken = library_step(problem, gradalign.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    assert all(g.isfinite().all() for g in taken.grads.values() if g is not None)
    _, loss = gradalign_by_hand(s, 1, "zero", detach, 2.0)
    torch.testing.assert_close(taken.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    descend_on(s.twin, loss, s.lr)
    assert_same(s.model, s.twin, rtol=1e-8, atol=1e-10)


@examples(0.3)
@given(s=scenes(), coefficient=st.floats(0.5, 5.0))
def test_gradalign_detached_against_central_differences(s, coefficient):
    """Of its loss with the clean gradient held at its value, along a random direction in every parameter."""
    problem = gradalign.problem(s.epsilon, coefficient)
    step = gradalign.solver().hypergradient(problem, s.model, s.batch, generator=seeded(s.seed))
    eta = uniform_noise(s.x.shape, s.epsilon, seeded(s.seed))
    clean, delta = ce_gradient(s.twin, s.x, s.y), step.solution.delta

    def value():
        return gradalign_loss(s.twin, s.x, s.y, delta, eta, coefficient, clean).item()

    size = norm(step.grads.values())
    h = 1e-6
    for parameter, gradient in zip(s.twin.parameters(), step.grads.values(), strict=True):
        unit = torch.randn(parameter.shape, generator=seeded(s.seed), dtype=F64)
        unit /= unit.norm()
        with torch.no_grad():
            before = parameter.clone()
            parameter.copy_(before + h * unit)
        above = value()
        with torch.no_grad():
            parameter.copy_(before - h * unit)
        below = value()
        with torch.no_grad():
            parameter.copy_(before)
        analytic = 0.0 if gradient is None else (gradient * unit).sum().item()
        assert abs(analytic - (above - below) / (2 * h)) <= 1e-5 * size + 1e-8


@examples(0.3)
@given(s=scenes(), coefficient=st.floats(0.5, 5.0))
def test_gradalign_undetached_passes_hypergradcheck(s, coefficient):
    problem = gradalign.problem(s.epsilon, coefficient, detach=False)
    assert hypergradcheck(problem, gradalign.solver(), s.model, s.batch, rtol=1e-5, atol=1e-8, generator=seeded(s.seed))


def test_gradalign_detached_is_not_the_gradient_of_the_loss():
    """So that the two tests above tell the two forms apart."""
    model, batch = steep_network()
    for detach in (True, False):
        problem = gradalign.problem(0.2, 2.0, detach=detach)
        passed = hypergradcheck(
            problem, gradalign.solver(), model, batch, generator=seeded(0), directions=3, raise_exception=False
        )
        assert passed is not detach


def test_gradalign_coefficients_are_the_published_ones():
    published = {2: 0.036, 4: 0.063, 6: 0.112, 8: 0.200, 10: 0.356, 12: 0.632, 14: 1.124, 16: 2.000}
    for level, value in published.items():
        assert gradalign.published_coefficient(level / 255) == pytest.approx(value, rel=1e-9)
        assert gradalign.problem(level / 255).upper.coefficient == pytest.approx(value, rel=1e-9)
    # between them the authors' script is log-linear: 0.047, 0.084, 0.150, 0.267, 0.474, 0.843, 1.500 at odd levels
    for level, value in {3: 0.047, 5: 0.084, 7: 0.150, 9: 0.267, 11: 0.474, 13: 0.843, 15: 1.500}.items():
        assert gradalign.published_coefficient(level / 255) == pytest.approx(value, rel=0.02)
