"""Fast-BAT: equations 8 to 14, Proposition 1, Corollary 1, the four schemes of Table A4, bfloat16."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from examples import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import F64, SOLVERS, network
from torch import nn
from torch.nn import functional as F
from transcriptions import (
    SECOND,
    STARTS,
    assert_same,
    bat_terms,
    bat_weights,
    ce,
    ce_gradient,
    clip,
    cube_start,
    descend,
    drawing,
    library_step,
    norm,
    relative_error,
    scenes,
    seeded,
    sign_step,
    small_convolutional,
    steep_network,
    total,
    under_autocast,
    uniform_start,
)

import bilevel_at as ba
from bilevel_at.problems import fastbat
from bilevel_at.solvers import HessianFreeKKT


def anchor_of(scheme, model, x, y, epsilon, step, generator, drawn):
    """Remark 2's four linearisation points; ``drawn`` is the library's where only its distribution is prescribed."""
    if scheme == "corner":
        return drawn
    start = cube_start(x, epsilon, generator)
    if scheme == "gradient-step":
        return clip(start + step * ce_gradient(model, x + start, y), x, epsilon)
    if scheme == "sign-step":
        return sign_step(model, x, y, start, 0.5 * epsilon, epsilon)
    return start


# Steps of this size against gradients of about 0.1 to 1 leave most coordinates between their bounds.
bat_steps = st.floats(0.05, 0.4)


def bat_scenes():
    """ε large enough, and networks steep enough, that the implicit term counts."""
    return scenes().map(lambda s: replace(s, epsilon=0.1 + s.epsilon / 2))


@pytest.mark.parametrize("scheme", ["gradient-step", "uniform", "corner", "sign-step"])
@examples(0.3)
@given(s=bat_scenes(), step=bat_steps, weight=bat_weights, cross_at=st.sampled_from(["anchor", "solution"]))
def test_fast_bat_hessian_free(scheme, s, step, weight, cross_at):
    """Equations 9, 13 and 14: w = (1/λ) 1_F ∘ ∇_δ ℓ_tr; ig_weight = α₂/α₁ = ig_factor · λ.

    Equation 13 writes the cross derivative at δ*; that of the g in equation 8, which is linear around z, is at z.
    """
    problem = fastbat.problem(s.epsilon, step, scheme)
    solver = fastbat.solver("hessian-free-kkt", s.epsilon, step, ig_factor=weight * step)
    assert solver.ig_weight == pytest.approx(weight) and solver.cross_at == "anchor"
    taken = library_step(
        problem, HessianFreeKKT(solver.ig_weight, cross_at=cross_at), s.model, s.batch, s.lr, seeded(s.seed)
    )
    z = anchor_of(scheme, s.twin, s.x, s.y, s.epsilon, step, seeded(s.seed), taken.solution.anchor)
    terms = bat_terms(s.twin, s.x, s.y, z, step, s.epsilon, cross_at)
    torch.testing.assert_close(taken.solution.delta, terms.delta, rtol=1e-11, atol=1e-13)
    cross = terms.cross(step * (terms.free * terms.v))
    size = weight * norm(cross)
    assume(terms.free.double().mean() >= 0.25 and size > 1e-3 * norm(terms.direct))  # or nothing is tested
    assert taken.implicit_norm.item() == pytest.approx(size, rel=1e-8)
    descend(s.twin, total(terms.direct, cross, weight), s.lr)
    assert_same(s.model, s.twin)


def attack_hessians(model, x, y, delta):
    """∇²_δδ ℓ_atk(θ, δ*) per sample, ``[B, d, d]``, row by row with torch.autograd.functional."""
    d = x[0].numel()
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda e, i=i: -ce(model, x[i : i + 1] + e, y[i : i + 1]).sum(), row)
            for i, row in enumerate(delta.split(1))
        ]
    ).reshape(len(x), d, d)


def proposition_1(hessian, free, v):
    """w of one sample from equation 11: H⁻¹v − H⁻¹B₀ᵀ (B₀H⁻¹B₀ᵀ)⁻¹ B₀H⁻¹v, B₀ the rows of I that are active."""
    inverse = torch.linalg.inv(hessian)
    rows = torch.eye(len(v), dtype=v.dtype)[~free]
    w = inverse @ v
    if len(rows):
        w = w - inverse @ rows.T @ torch.linalg.solve(rows @ inverse @ rows.T, rows @ inverse @ v)
    return w


@examples(0.3)
@given(s=bat_scenes(), step=bat_steps, weight=bat_weights)
def test_fast_bat_hessian_aware(s, step, weight):
    """Proposition 1 as displayed, with H = ∇²_δδ ℓ_atk(θ, δ*) + λI dense, and a test that it is not Corollary 1."""
    problem = fastbat.problem(s.epsilon, step)
    solver = fastbat.solver("full-kkt", s.epsilon, step, ig_factor=weight * step)
    z0 = cube_start(s.x, s.epsilon, seeded(s.seed))
    z = clip(z0 + step * ce_gradient(s.twin, s.x + z0, s.y), s.x, s.epsilon)
    terms = bat_terms(s.twin, s.x, s.y, z, step, s.epsilon)
    d = s.x[0].numel()
    H = attack_hessians(s.twin, s.x, s.y, terms.delta) + torch.eye(d, dtype=F64) / step
    assume((torch.linalg.eigvalsh(H) > 0.1 / step).all())  # −ℓ is concave where the network is; λ has to win
    free, v = terms.free.flatten(1), terms.v.flatten(1)
    w = torch.stack([proposition_1(*row) for row in zip(H, free, v, strict=True)]).reshape(s.x.shape)
    cross = terms.cross(w)
    assume(weight * norm(cross) > 1e-3 * norm(terms.direct))
    taken = library_step(problem, solver, s.model, s.batch, s.lr, seeded(s.seed))
    assert taken.implicit_norm.item() == pytest.approx(weight * norm(cross), rel=1e-7)
    descend(s.twin, total(terms.direct, cross, weight), s.lr)
    assert_same(s.model, s.twin)


def test_the_implicit_term_and_the_hessian_count_in_these_settings():
    """What the two tests above would not notice if it were zero: both terms, over a spread of networks."""
    implicit, difference, free = [], [], []
    for seed in range(10):
        model, batch = steep_network(seed)
        steps = [
            fastbat.solver(name, 0.25, 0.3, ig_factor=0.3).hypergradient(
                fastbat.problem(0.25, 0.3), model, batch, generator=seeded(seed)
            )
            for name in ("hessian-free-kkt", "full-kkt")
        ]
        implicit.append(steps[0].implicit_norm / steps[0].direct_norm)
        difference.append(abs(steps[0].implicit_norm - steps[1].implicit_norm) / steps[0].implicit_norm)
        free.append((steps[0].solution.delta.abs() < 0.25).double().mean())
    assert torch.stack(implicit).median() > 0.03
    assert torch.stack(difference).median() > 0.005
    assert torch.stack(free).median() > 0.3


def test_fast_bat_steps_are_the_published_ones():
    for level, numerator in ((2, 5000), (8, 5000), (9, 2000), (16, 2000)):
        lower, solver = fastbat.problem(level / 255).lower, fastbat.solver(epsilon=level / 255)
        assert lower.step.value == pytest.approx(numerator / 255)
        assert solver.ig_weight == pytest.approx(0.1 * 255 / numerator)  # α₂/λ = 0.1 α₁


SCHEMES = {
    "uniform": lambda model, x, y, z0, step: z0,
    "gradient-step": lambda model, x, y, z0, step: ba.LinfBall(0.1).project(
        z0 + step * ce_gradient(model, x + z0, y), x
    ),
    "sign-step": lambda model, x, y, z0, step: ba.LinfBall(0.1).project(
        z0 + 0.05 * ce_gradient(model, x + z0, y).sign(), x
    ),
    "corner": lambda model, x, y, z0, step: ba.Corner().fresh(ba.LinfBall(0.1), x, torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("draw", STARTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_fast_bat_with_each_linearisation_scheme(scheme, draw):
    """Equations 9 and 14 of the paper with its four schemes (Table A4), transcribed."""
    model, x, y = network()
    step, batch = 0.5, ba.Batch(x, y)
    problem = fastbat.problem(epsilon=0.1, step=step, anchor=scheme, **drawing(draw))
    hyper = HessianFreeKKT(ig_weight=0.3).hypergradient(
        problem, model, batch, generator=torch.Generator().manual_seed(1)
    )

    z = SCHEMES[scheme](model, x, y, STARTS[draw](x, 0.1, torch.Generator().manual_seed(1)), step)
    low, high = ba.LinfBall(0.1).box(x)
    u = z + step * ce_gradient(model, x + z, y)
    delta = torch.clamp(u, low, high)
    torch.testing.assert_close(hyper.solution.delta, delta)
    free = (u > low) & (u < high)
    v = ce_gradient(model, x + delta, y) / len(x)
    point = (x + z).requires_grad_()
    (atk,) = torch.autograd.grad(-F.cross_entropy(model(point), y, reduction="sum"), point, create_graph=True)
    implicit = torch.autograd.grad((atk * (v * free * step)).sum(), list(model.parameters()), allow_unused=True)
    direct = torch.autograd.grad(F.cross_entropy(model(x + delta), y), list(model.parameters()))
    for (name, _), d, i in zip(model.named_parameters(), direct, implicit, strict=True):
        torch.testing.assert_close(hyper.grads[name], d if i is None else d - 0.3 * i)


def test_published_fast_bat_constants():
    assert fastbat.problem(epsilon=8 / 255).lower.step.value == pytest.approx(5000 / 255)
    assert fastbat.problem(epsilon=16 / 255).lower.step.value == pytest.approx(2000 / 255)
    assert fastbat.solver().ig_weight == pytest.approx(0.1 * 255 / 5000)
    assert fastbat.solver("full-kkt", epsilon=16 / 255).ig_weight == pytest.approx(0.1 * 255 / 2000)
    assert fastbat.solver("full-kkt").curvature == "attack"


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_every_solver_runs_fast_bat_on_images(solver):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    step = solver.backward(fastbat.problem(), model, ba.Batch(x, y))
    assert step.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_bfloat16_fast_bat(weight):
    """The hypergradient with its implicit term, from the same anchor."""
    worst, shares = 0.0, []
    for seed in range(5):
        model, batch = small_convolutional(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 2  # steeper, so that the implicit term is a fair part of the whole
        exact = copy.deepcopy(model).double()
        problem = fastbat.problem(0.2, 1.0)
        solver = fastbat.solver("hessian-free-kkt", 0.2, 1.0, ig_factor=weight)
        z = uniform_start(batch.x, 0.2, seeded(seed))
        under_autocast(problem, solver, model, batch, anchor=z)
        precise = solver.hypergradient(problem, exact, ba.Batch(batch.x.double(), batch.y), anchor=z.double())
        worst = max(worst, relative_error(model, list(precise.grads.values())))
        shares.append((precise.implicit_norm / precise.direct_norm).item())
    print(f"bfloat16, fastbat at weight {weight}: {worst:.4f} (bound {SECOND:.4f}), implicit/direct {min(shares):.3f}")
    assert worst <= SECOND
    assert weight == 0 or min(shares) > 2 * SECOND  # so that losing it would be seen
