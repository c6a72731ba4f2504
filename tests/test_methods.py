"""Every method's one-step update against its paper's equations, written out here with plain autograd in float64.

The transcriptions share nothing with the library but the network: losses are spelled out, projections are clamps, and
draws are repeated from a generator in the same state. Equation numbers are those of the papers the problem files cite.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.data import Images, Loader
from bilevel_at.evaluate.attacks import attack_from_name
from bilevel_at.problems import (
    asgd_bca,
    atas,
    atta,
    beta,
    fastat,
    fastbat,
    fgsm,
    free,
    gradalign,
    mart,
    minmax,
    remembered_fastbat,
    sgd_bca,
    smooth_beta,
    standard,
    trades,
)
from bilevel_at.runs.metrics import last_is_first_to_fall
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck
from bilevel_at.testing import strategies as bst
from bilevel_at.train import Recipe, Trainer, catastrophic_overfitting

F64 = torch.float64


# --- the pieces every transcription is made of ----------------------------------------------------------------------


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def ce(model, x, y):
    """−log softmax(f(x))_y, per sample."""
    out = model(x)
    return out.logsumexp(1) - out.gather(1, y[:, None])[:, 0]


def input_gradient(loss, x):
    """∇_x Σ_i loss(x)_i, detached."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


def ce_gradient(model, x, y):
    return input_gradient(lambda x: ce(model, x, y), x)


def box(x, epsilon):
    """p_i = max(−ε, −x_i), q_i = min(ε, 1 − x_i) (Fast-BAT paper, Corollary 1)."""
    return torch.maximum(torch.full_like(x, -epsilon), -x), torch.minimum(torch.full_like(x, epsilon), 1 - x)


def clip(delta, x, epsilon):
    low, high = box(x, epsilon)
    return torch.minimum(torch.maximum(delta, low), high)


def uniform_start(x, epsilon, generator):
    """U(C(x))."""
    low, high = box(x, epsilon)
    return low + (high - low) * torch.rand(x.shape, generator=generator, dtype=x.dtype)


def uniform_noise(shape, epsilon, generator):
    """U[−ε, ε]^d."""
    return -epsilon + 2 * epsilon * torch.rand(shape, generator=generator, dtype=F64)


def by_sample(value, like):
    return value.reshape(-1, *[1] * (like.ndim - 1))


def descend(model, gradients, lr):
    """θ ← θ − lr · g."""
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter -= lr * gradient


def descend_on(model, objective, lr):
    descend(model, torch.autograd.grad(objective, list(model.parameters()), allow_unused=True), lr)


def library_step(problem, solver, model, batch, lr, generator=None):
    """What a training loop does with the library."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.zero_grad()
    step = solver.backward(problem, model, batch, generator=generator)
    optimizer.step()
    return step


def assert_same(model, twin, rtol=1e-9, atol=1e-11):
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_moved(model, before):
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


@dataclass
class Scene:
    """A network, its copy for the transcription, a batch, and the numbers every method has."""

    model: torch.nn.Module
    twin: torch.nn.Module
    batch: ba.Batch
    classes: int
    epsilon: float
    lr: float
    seed: int

    @property
    def x(self):
        return self.batch.x

    @property
    def y(self):
        return self.batch.y


def with_kinks(model):
    """The same network with ReLUs."""
    layers = [torch.nn.ReLU() if isinstance(m, (torch.nn.Tanh, torch.nn.Softplus)) else m for m in model]
    return torch.nn.Sequential(*layers)


@st.composite
def scenes(draw, kinks=False, max_values=8, max_size=4, classes=None):
    """Smooth networks, and where ``kinks`` ReLU ones too."""
    shape = draw(bst.shapes(max_values))
    classes = draw(st.integers(2, 4)) if classes is None else classes
    model = draw(bst.smooth_models(shape, classes))
    if kinks and draw(st.booleans()):
        model = with_kinks(model)
    batch = draw(bst.batches(shape, classes, max_size))
    epsilon, lr = draw(st.floats(0.02, 0.4)), draw(st.floats(0.01, 1.0))
    return Scene(model, copy.deepcopy(model), batch, classes, epsilon, lr, draw(bst.seeds))


def sign_step(model, x, y, z, step, epsilon):
    """z one sign step up the cross-entropy, projected (Fast-BAT paper, equation 6)."""
    return clip(z + step * ce_gradient(model, x + z, y).sign(), x, epsilon)


# --- sign attacks -----------------------------------------------------------------------------------------------------


@given(s=scenes(kinks=True))
def test_standard(s):
    step = library_step(standard.problem(s.epsilon), standard.solver(), s.model, s.batch, s.lr)
    descend_on(s.twin, ce(s.twin, s.x, s.y).mean(), s.lr)
    assert_same(s.model, s.twin)
    assert not step.solution.delta.any()


@pytest.mark.parametrize("start", ["zero", "uniform", "corner"])
@given(s=scenes(kinks=True), factor=st.one_of(st.none(), st.floats(0.1, 3.0)))
def test_fgsm(start, s, factor):
    """θ ← θ − lr ∇ mean ℓ(θ, P_C(z − step · sign ∇ℓ_atk)); step ε unless it is given."""
    length = s.epsilon if factor is None else factor * s.epsilon
    problem = fgsm.problem(s.epsilon, start, None if factor is None else length)
    step = library_step(problem, fgsm.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    low, high = box(s.x, s.epsilon)
    if start == "zero":
        z = torch.zeros_like(s.x)
    elif start == "uniform":
        z = uniform_start(s.x, s.epsilon, seeded(s.seed))
    else:
        z = step.solution.anchor
        assert ((z == low) | (z == high)).all()  # {−ε, ε}^d, cut to the input range
    torch.testing.assert_close(step.solution.anchor, z, rtol=1e-12, atol=1e-15)
    delta = sign_step(s.twin, s.x, s.y, z, length, s.epsilon)
    torch.testing.assert_close(step.solution.delta, delta, rtol=1e-12, atol=1e-14)
    descend_on(s.twin, ce(s.twin, s.x + delta, s.y).mean(), s.lr)
    assert_same(s.model, s.twin)


def test_random_corners_are_fair():
    x = torch.full((1, 4000), 0.5, dtype=F64)
    model = torch.nn.Linear(4000, 2).double()
    lower = fgsm.problem(0.1, "corner").lower
    z = lower.draw_anchor(model, ba.Batch(x, torch.tensor([0])), seeded(3))
    assert abs((z > 0).double().mean().item() - 0.5) < 0.04  # five standard deviations


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


@given(s=scenes(kinks=True), steps=st.integers(1, 4), factor=st.one_of(st.none(), st.floats(0.1, 1.5)))
def test_pgd(s, steps, factor):
    """Madry's update: K projected sign steps from a uniform draw, δ* then a constant."""
    length = s.epsilon / 4 if factor is None else factor * s.epsilon
    problem = minmax.problem(s.epsilon, steps, None if factor is None else length)
    step = library_step(problem, minmax.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    delta = uniform_start(s.x, s.epsilon, seeded(s.seed))
    for _ in range(steps):
        delta = sign_step(s.twin, s.x, s.y, delta, length, s.epsilon)
    torch.testing.assert_close(step.solution.delta, delta, rtol=1e-12, atol=1e-14)
    descend_on(s.twin, ce(s.twin, s.x + delta, s.y).mean(), s.lr)
    assert_same(s.model, s.twin)


@pytest.mark.parametrize(("file", "mode"), [(fastat, "train"), (atta, "eval")], ids=["fastat", "atta"])
def test_attack_passes_see_batch_statistics_as_published(file, mode):
    """Fast-AT attacks in train mode, which moves the running statistics too; ATTA in eval mode, which does not."""
    torch.manual_seed(5)
    layers = [torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 3)]
    model = torch.nn.Sequential(*layers).double()
    model[1].running_mean.normal_()
    twin = copy.deepcopy(model)
    batch = ba.Batch(torch.rand(7, 6, dtype=F64), torch.randint(0, 3, (7,)), torch.arange(7))
    step = library_step(file.problem(0.1), file.solver(), model, batch, 0.5, seeded(1))
    assert model.training
    twin.train(mode == "train")
    length = {"train": 0.125, "eval": 4 / 255}[mode]
    delta = sign_step(twin, batch.x, batch.y, step.solution.anchor, length, 0.1)
    torch.testing.assert_close(step.solution.delta, delta)
    twin.train()
    descend_on(twin, ce(twin, batch.x + delta, batch.y).mean(), 0.5)
    assert_same(model, twin)
    for got, want in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want)


# --- Fast-BAT ---------------------------------------------------------------------------------------------------------


@dataclass
class BatTerms:
    """What equation 14 adds up: δ*, ∇_θ mean ℓ_tr, and (∇_θδ ℓ_atk) w / B for a given w."""

    delta: torch.Tensor
    free: torch.Tensor
    v: torch.Tensor
    direct: list
    cross: Callable


def bat_terms(model, x, y, z, step, epsilon, cross_at="anchor"):
    """Equations 8, 9 and 14. ``step``: 1/λ, a number or one per sample."""
    parameters = list(model.parameters())
    low, high = box(x, epsilon)
    scaled = by_sample(step, x) if isinstance(step, torch.Tensor) else step
    delta = clip(z + scaled * ce_gradient(model, x + z, y), x, epsilon)
    free = (low < delta) & (delta < high)
    v = ce_gradient(model, x + delta, y)
    direct = torch.autograd.grad(ce(model, x + delta, y).mean(), parameters)

    def cross(w):
        """∇_θ mean_i ⟨∇_δ ℓ_atk(θ, z_i), w_i⟩, with w constant and ℓ_atk = −ℓ_tr."""
        at = (x + (z if cross_at == "anchor" else delta)).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(-ce(model, at, y).sum(), at, create_graph=True)
        product = (gradient * w.detach()).sum() / len(x)
        return torch.autograd.grad(product, parameters, allow_unused=True)

    return BatTerms(delta, free, v, direct, cross)


def total(direct, cross, weight):
    """∇ = direct + weight · (−1) · cross: the implicit gradient is −(1/λ) ∇_θδ ℓ_atk H_C (equation 13)."""
    return [d if c is None else d - weight * c for d, c in zip(direct, cross, strict=True)]


def norm(gradients):
    return math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))


def anchor_of(scheme, model, x, y, epsilon, step, generator, drawn):
    """Remark 2's four linearisation points; ``drawn`` is the library's where only its distribution is prescribed."""
    if scheme == "corner":
        return drawn
    start = uniform_start(x, epsilon, generator)
    if scheme == "gradient-step":
        return clip(start + step * ce_gradient(model, x + start, y), x, epsilon)
    if scheme == "sign-step":
        return sign_step(model, x, y, start, 0.5 * epsilon, epsilon)
    return start


# Steps of this size against gradients of about 0.1 to 1 leave most coordinates between their bounds.
bat_steps = st.floats(0.05, 0.4)
bat_weights = st.floats(0.3, 2.0)


def bat_scenes():
    """ε large enough, and networks steep enough, that the implicit term counts."""
    return scenes().map(lambda s: replace(s, epsilon=0.1 + s.epsilon / 2))


@pytest.mark.parametrize("scheme", ["gradient-step", "uniform", "corner", "sign-step"])
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


@given(s=bat_scenes(), step=bat_steps, weight=bat_weights)
def test_fast_bat_hessian_aware(s, step, weight):
    """Proposition 1 as displayed, with H = ∇²_δδ ℓ_atk(θ, δ*) + λI dense, and a test that it is not Corollary 1."""
    problem = fastbat.problem(s.epsilon, step)
    solver = fastbat.solver("full-kkt", s.epsilon, step, ig_factor=weight * step)
    z0 = uniform_start(s.x, s.epsilon, seeded(s.seed))
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


def steep_network(seed=0, d=8, classes=3):
    torch.manual_seed(seed)
    layers = [torch.nn.Flatten(), torch.nn.Linear(d, 12), torch.nn.Tanh(), torch.nn.Linear(12, classes)]
    model = torch.nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2.5
    return model, ba.Batch(torch.rand(6, d, dtype=F64), torch.randint(0, classes, (6,)), torch.arange(6))


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
        assert lower.step_size() == pytest.approx(numerator / 255)
        assert solver.ig_weight == pytest.approx(0.1 * 255 / numerator)  # α₂/λ = 0.1 α₁


# --- GradAlign --------------------------------------------------------------------------------------------------------


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


def gradalign_by_hand(s, steps, start, detach, coefficient):
    """δ* and the loss, with the draws in the order anchor, η; from zero the anchor draws nothing."""
    generator = seeded(s.seed)
    delta = torch.zeros_like(s.x) if start == "zero" else uniform_start(s.x, s.epsilon, generator)
    for _ in range(steps):
        delta = sign_step(s.twin, s.x, s.y, delta, (1.25 if steps == 1 else 0.5) * s.epsilon, s.epsilon)
    eta = uniform_noise(s.x.shape, s.epsilon, generator)
    clean = ce_gradient(s.twin, s.x, s.y) if detach else None
    return delta, gradalign_loss(s.twin, s.x, s.y, delta, eta, coefficient, clean)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("steps", "start"), [(1, "zero"), (1, "uniform"), (2, "zero"), (2, "uniform")])
@given(s=scenes(), coefficient=st.floats(0.05, 5.0))
def test_gradalign(steps, start, detach, s, coefficient):
    problem = gradalign.problem(s.epsilon, coefficient, steps, start, detach=detach)
    taken = library_step(problem, gradalign.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    delta, loss = gradalign_by_hand(s, steps, start, detach, coefficient)
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
            kept = parameter.clone()
            parameter.copy_(kept + h * unit)
        above = value()
        with torch.no_grad():
            parameter.copy_(kept - h * unit)
        below = value()
        with torch.no_grad():
            parameter.copy_(kept)
        analytic = 0.0 if gradient is None else (gradient * unit).sum().item()
        assert abs(analytic - (above - below) / (2 * h)) <= 1e-5 * size + 1e-8


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


# --- remembered perturbations -----------------------------------------------------------------------------------------


@dataclass
class Visits:
    """A few examples, met several times in changing order and company while the network is trained."""

    x: torch.Tensor
    y: torch.Tensor
    model: torch.nn.Module
    twin: torch.nn.Module
    epsilon: float
    lr: float
    seed: int

    def epochs(self, count, size=2):
        """(epoch, indices) of every batch."""
        g = seeded(self.seed)
        for epoch in range(count):
            for index in torch.randperm(len(self.x), generator=g).split(size):
                yield epoch, index

    def batch(self, index, view=None):
        x = self.x[index] if view is None else view.apply(view.pad(self.x[index]))
        return ba.Batch(x, self.y[index], index, view)


@st.composite
def visits(draw, n=5, image=None, kinks=False):
    shape = draw(bst.shapes(8)) if image is None else image
    classes = draw(st.integers(2, 4))
    model = draw(bst.smooth_models(shape, classes))
    if kinks and draw(st.booleans()):
        model = with_kinks(model)
    g = seeded(draw(bst.seeds))
    x, y = torch.rand((n, *shape), generator=g, dtype=F64), torch.randint(0, classes, (n,), generator=g)
    epsilon, lr = draw(st.floats(0.05, 0.3)), draw(st.floats(0.05, 0.5))
    return Visits(x, y, model, copy.deepcopy(model), epsilon, lr, draw(bst.seeds))


class Kept:
    """x_i^{j−1} of Algorithm 1 as δ, v_i and v̂_i, for every example."""

    def __init__(self, n, epsilon, generator):
        self.delta = [None] * n
        self.v, self.largest = torch.zeros(n, dtype=F64), torch.zeros(n, dtype=F64)
        self.epsilon, self.generator = epsilon, generator

    def start(self, batch):
        """z_i: what is kept of each example, or Uniform(−ε, ε), projected."""
        # The library draws for the whole batch whatever is known of it.
        fresh = uniform_noise(batch.x.shape, self.epsilon, self.generator)
        rows = [
            new if self.delta[i] is None else self.delta[i] for i, new in zip(batch.index.tolist(), fresh, strict=True)
        ]
        return clip(torch.stack(rows), batch.x, self.epsilon)

    def keep(self, batch, delta):
        for i, row in zip(batch.index.tolist(), delta, strict=True):
            self.delta[i] = row

    def follow(self, index, gradient, momentum):
        """v_i ← β v_i + (1 − β) ‖∇ℓ‖² and v̂_i ← max(v̂_i, v_i)."""
        self.v[index] = momentum * self.v[index] + (1 - momentum) * gradient.flatten(1).norm(dim=1) ** 2
        self.largest[index] = torch.maximum(self.largest[index], self.v[index])
        return self.v[index]


def play(v, problem, solver, update, epochs=3, rtol=1e-9, atol=1e-11):
    """Train both copies side by side on what ``update(kept, batch, epoch)`` says δ* is."""
    generator = seeded(v.seed + 1)
    kept = Kept(len(v.x), v.epsilon, seeded(v.seed + 1))
    for epoch, index in v.epochs(epochs):
        problem.set_epoch(epoch, 30)
        batch = v.batch(index)
        step = library_step(problem, solver, v.model, batch, v.lr, generator)
        delta = update(kept, batch, epoch)
        torch.testing.assert_close(step.solution.delta, delta, rtol=rtol, atol=atol)
        descend_on(v.twin, ce(v.twin, batch.x + delta, batch.y).mean(), v.lr)
        assert_same(v.model, v.twin, rtol, atol)
    return kept


@given(v=visits(kinks=True), factor=st.floats(0.1, 2.0))
def test_atta(v, factor):
    """x^j = Π(x^{j−1} + α sign ∇ℓ), α constant (ATAS paper, equation 5)."""

    def update(kept, batch, epoch):
        delta = sign_step(v.twin, batch.x, batch.y, kept.start(batch), factor * v.epsilon, v.epsilon)
        kept.keep(batch, delta)
        return delta

    play(v, atta.problem(v.epsilon, factor * v.epsilon), atta.solver(), update)


@given(
    v=visits(), c=st.floats(0.05, 3.0), momentum=st.floats(0.0, 0.9), top=st.floats(0.6, 4.0), warm=st.integers(0, 2)
)
def test_atas(v, c, momentum, top, warm):
    """Algorithm 1 with what the published code adds: a constant step ε at first, and steps clipped to ε/2 … 7ε/4."""

    def update(kept, batch, epoch):
        z = kept.start(batch)
        gradient = ce_gradient(v.twin, batch.x + z, batch.y)
        followed = kept.follow(batch.index, gradient, momentum)
        alpha = top * v.epsilon * c / (c + followed.sqrt())
        alpha = torch.full_like(alpha, v.epsilon) if epoch < warm else alpha.clamp(v.epsilon / 2, 7 * v.epsilon / 4)
        delta = clip(z + by_sample(alpha, z) * gradient.sign(), batch.x, v.epsilon)
        kept.keep(batch, delta)
        return delta

    problem = atas.problem(v.epsilon, top * v.epsilon, c, momentum, warmup_epochs=warm)
    kept = play(v, problem, atas.solver(), update)
    torch.testing.assert_close(problem.lower.step.memory.values[: len(v.x)], kept.v, rtol=1e-9, atol=1e-15)


def crop(canvas, top, left, flip, side):
    """One image's window, cut and mirrored by plain slicing."""
    window = canvas[:, top : top + side, left : left + side]
    return window.flip(2) if flip else window


@pytest.mark.parametrize("file", [atta, atas])
@given(v=visits(image=(1, 3, 3)), padding=st.integers(1, 2), draws=bst.seeds)
def test_perturbations_move_with_the_crop_and_flip(file, v, padding, draws):
    """ATTA's augmentation: the canvas is kept, each visit sees and rewrites the window that its image does."""
    side, c = 3, 0.7
    problem = atta.problem(v.epsilon, 0.4 * v.epsilon) if file is atta else atas.problem(v.epsilon, v.epsilon, c=c)
    generator, mirror, crops = seeded(v.seed + 1), seeded(v.seed + 1), seeded(draws)
    canvases, squares = {}, torch.zeros(len(v.x), dtype=F64)
    for epoch, index in v.epochs(3):
        problem.set_epoch(epoch + 5, 30)  # past ATAS' warm-up
        view = ba.CropFlip.draw(len(index), padding, crops, torch.device("cpu"))
        batch = v.batch(index, view)
        step = library_step(problem, file.solver(), v.model, batch, v.lr, generator)
        wide = side + 2 * padding
        fresh = uniform_noise((len(index), 1, wide, wide), v.epsilon, mirror)
        places = list(zip(view.top.tolist(), view.left.tolist(), view.flip.tolist(), strict=True))
        images = F.pad(v.x[index], (padding,) * 4)
        x = torch.stack([crop(image, *place, side) for image, place in zip(images, places, strict=True)])
        assert torch.equal(batch.x, x)
        rows = []
        for k, i in enumerate(index.tolist()):
            canvases.setdefault(i, fresh[k].clone())
            rows.append(crop(canvases[i], *places[k], side))
        z = clip(torch.stack(rows), x, v.epsilon)
        gradient = ce_gradient(v.twin, x + z, batch.y)
        squares[index] = 0.5 * squares[index] + 0.5 * gradient.flatten(1).norm(dim=1) ** 2
        adaptive = (v.epsilon * c / (c + squares[index].sqrt())).clamp(v.epsilon / 2, 7 * v.epsilon / 4)
        alpha = torch.full((len(index),), 0.4 * v.epsilon, dtype=F64) if file is atta else adaptive
        delta = clip(z + by_sample(alpha, z) * gradient.sign(), x, v.epsilon)
        torch.testing.assert_close(step.solution.delta, delta, rtol=1e-9, atol=1e-12)
        for k, i in enumerate(index.tolist()):
            top, left, flip = places[k]
            canvases[i][:, top : top + side, left : left + side] = delta[k].flip(2) if flip else delta[k]
            torch.testing.assert_close(problem.lower.anchor.memory.values[i], canvases[i], rtol=1e-9, atol=1e-12)
        descend_on(v.twin, ce(v.twin, x + delta, batch.y).mean(), v.lr)
        assert_same(v.model, v.twin)


def resized(delta, side):
    return F.interpolate(delta, (side, side), mode="bilinear", align_corners=False, antialias=True)


@given(v=visits(n=4, image=(1, 3, 3)), size=st.integers(1, 4), step=st.floats(0.1, 1.5))
def test_perturbations_kept_at_another_size(v, size, step):
    """Algorithm 2: δ resized to be used, and resized again to be stored; δ* itself is feasible."""
    problem = atta.problem(v.epsilon, step * v.epsilon, size=size)
    generator, mirror, small = seeded(v.seed + 1), seeded(v.seed + 1), {}
    for _, index in v.epochs(3):
        batch = v.batch(index)
        taken = library_step(problem, atta.solver(), v.model, batch, v.lr, generator)
        fresh = uniform_noise((len(index), 1, size, size), v.epsilon, mirror)
        stored = torch.stack([small.get(i, fresh[k]) for k, i in enumerate(index.tolist())])
        z = clip(resized(stored, 3), batch.x, v.epsilon)
        delta = sign_step(v.twin, batch.x, batch.y, z, step * v.epsilon, v.epsilon)
        found = taken.solution.delta
        torch.testing.assert_close(found, delta, rtol=1e-9, atol=1e-12)
        low, high = box(batch.x, v.epsilon)
        assert ((found >= low) & (found <= high)).all()
        for k, i in enumerate(index.tolist()):
            small[i] = resized(delta[k : k + 1], size)[0]
            kept = problem.lower.anchor.memory.values[i]
            assert kept.shape == (1, size, size) and kept.abs().max() <= v.epsilon * (1 + 1e-12)
            torch.testing.assert_close(kept, small[i], rtol=1e-9, atol=1e-12)
        descend_on(v.twin, ce(v.twin, batch.x + delta, batch.y).mean(), v.lr)
        assert_same(v.model, v.twin)


@pytest.mark.parametrize("how", ["warm-up", "low = high"])
@given(v=visits(n=4))
def test_atas_with_a_constant_step_is_atta(how, v):
    if how == "warm-up":
        length, ours = v.epsilon, atas.problem(v.epsilon, warmup_epochs=30)
    else:
        length = 0.7 * v.epsilon
        steps = ba.Adaptive(gamma=1.0, c=0.5, low=length, high=length)
        loss, ball = ba.minus(ba.cross_entropy), ba.LinfBall(v.epsilon)
        lower = ba.Linearized(loss, ball, ba.Remembered(), "sign", steps)
        ours = ba.BilevelProblem(ba.UpperProblem(), lower)
    theirs = atta.problem(v.epsilon, length)
    draws = seeded(v.seed), seeded(v.seed)
    for epoch, index in v.epochs(3):
        ours.set_epoch(epoch, 30), theirs.set_epoch(epoch, 30)
        a = library_step(ours, atas.solver(), v.model, v.batch(index), v.lr, draws[0])
        b = library_step(theirs, atta.solver(), v.twin, v.batch(index), v.lr, draws[1])
        assert torch.equal(a.solution.delta, b.solution.delta)
        assert all(torch.equal(p, q) for p, q in zip(v.model.parameters(), v.twin.parameters(), strict=True))


@given(v=visits(), step=st.floats(0.05, 3.0))
def test_sgd_bca(v, step):
    """x_k ← Π(x_k + η_x ∇ℓ): ATTA without the sign (ATAS paper, section IV)."""

    def update(kept, batch, epoch):
        z = kept.start(batch)
        delta = clip(z + step * ce_gradient(v.twin, batch.x + z, batch.y), batch.x, v.epsilon)
        kept.keep(batch, delta)
        return delta

    play(v, sgd_bca.problem(v.epsilon, step), sgd_bca.solver(), update)


@given(v=visits(), eta=st.floats(0.01, 1.0), momentum=st.floats(0.0, 0.9))
def test_asgd_bca(v, eta, momentum):
    """x_k ← Π(x_k + η_x/√v̂_k · ∇ℓ), v̂ never decreasing."""
    record = []

    def update(kept, batch, epoch):
        z = kept.start(batch)
        gradient = ce_gradient(v.twin, batch.x + z, batch.y)
        kept.follow(batch.index, gradient, momentum)
        record.append(kept.largest.clone())
        length = eta / kept.largest[batch.index].sqrt()
        delta = clip(z + by_sample(length, z) * gradient, batch.x, v.epsilon)
        kept.keep(batch, delta)
        return delta

    problem = asgd_bca.problem(v.epsilon, eta, momentum)
    # The library divides by √v̂ + 1e-12, so that a gradient of zero has a step.
    kept = play(v, problem, asgd_bca.solver(), update, rtol=1e-7, atol=1e-8)
    n = len(v.x)
    torch.testing.assert_close(problem.lower.step.largest.values[:n], kept.largest, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(problem.lower.step.memory.values[:n], kept.v, rtol=1e-6, atol=1e-9)
    assert all((later >= earlier).all() for earlier, later in zip(record, record[1:], strict=False))


@given(seed=bst.seeds, momentum=st.floats(0.0, 0.8), shrink=st.floats(0.1, 0.5))
def test_asgd_bca_divides_by_the_largest_v(seed, momentum, shrink):
    """Where gradients shrink v̂ stays and v falls: the second step is shorter than ATAS' preconditioner has it."""
    model, batch = steep_network(seed % 1000)
    batch = replace(batch, x=0.3 + 0.4 * batch.x)  # clear of the input range: the ball alone could cut a step short
    epsilon, eta = 0.25, 0.02
    problem = asgd_bca.problem(epsilon, eta, momentum)
    first = problem.lower.solve(model, batch, generator=seeded(seed))
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


@given(v=visits(n=4), c=st.floats(0.1, 2.0), momentum=st.floats(0.0, 0.9), top=st.floats(0.1, 0.6), weight=bat_weights)
def test_remembered_fastbat(v, c, momentum, top, weight):
    """Its docstring's three lines over two visits: 1/λ_i = γ/(c + √v_i), and λ_i a constant of the solve."""
    problem = remembered_fastbat.problem(v.epsilon, top, c, momentum)
    solver = remembered_fastbat.solver("hessian-free-kkt", v.epsilon, top, ig_factor=weight * top)
    generator = seeded(v.seed + 1)
    kept = Kept(len(v.x), v.epsilon, seeded(v.seed + 1))
    counted = 0
    for _, index in v.epochs(2):
        batch = v.batch(index)
        taken = library_step(problem, solver, v.model, batch, v.lr, generator)
        z = kept.start(batch)
        followed = kept.follow(index, ce_gradient(v.twin, batch.x + z, batch.y), momentum)
        inverse = top * c / (c + followed.sqrt())
        terms = bat_terms(v.twin, batch.x, batch.y, z, inverse, v.epsilon)
        kept.keep(batch, terms.delta)
        torch.testing.assert_close(taken.solution.delta, terms.delta, rtol=1e-9, atol=1e-12)
        cross = terms.cross(by_sample(inverse, z) * (terms.free * terms.v))
        counted += weight * norm(cross) > 1e-3 * norm(terms.direct)
        descend(v.twin, total(terms.direct, cross, weight), v.lr)
        assert_same(v.model, v.twin)
    assume(counted)  # the implicit term was seen at least once


# --- Free-AT ----------------------------------------------------------------------------------------------------------


def free_pass(model, x, y, delta, step, epsilon, lr):
    """One replay of Algorithm 1: both gradients from the same pass, then both players move; returns the new δ."""
    used = clip(delta, x, epsilon)  # x + δ is an image when the network sees it
    at = (x + used).requires_grad_()
    loss = ce(model, at, y).mean()
    *gradients, towards = torch.autograd.grad(loss, [*model.parameters(), at])
    descend(model, gradients, lr)
    return (delta + step * towards.sign()).clamp(-epsilon, epsilon)


@given(s=scenes(kinks=True), replays=st.integers(1, 3), factor=st.floats(0.3, 1.2), carry=st.booleans())
def test_free_at(s, replays, factor, carry):
    """Algorithm 1 of Shafahi et al. over three batches, the last one short."""
    step = factor * s.epsilon
    problem = free.problem(s.epsilon, replays, step, carry)
    assert problem.replays == replays
    g, n = seeded(s.seed), len(s.x)
    delta = torch.zeros_like(s.x)
    for rows in (n, n, max(1, n - 1)):
        x = torch.rand((rows, *s.x.shape[1:]), generator=g, dtype=F64)
        y = torch.randint(0, s.classes, (rows,), generator=g)
        if not carry:
            delta = torch.zeros_like(s.x)
        for _ in range(replays):
            used = clip(delta[:rows], x, s.epsilon)
            taken = library_step(problem, free.solver(), s.model, ba.Batch(x, y), s.lr)
            torch.testing.assert_close(taken.solution.delta, used, rtol=1e-12, atol=1e-14)
            delta[:rows] = free_pass(s.twin, x, y, delta[:rows].clone(), step, s.epsilon, s.lr)
            assert_same(s.model, s.twin)
    if carry:
        torch.testing.assert_close(problem.lower.carried, delta, rtol=1e-12, atol=1e-14)


@given(s=scenes(kinks=True))
def test_free_at_once_without_carrying_is_standard_training(s):
    ours, theirs = free.problem(s.epsilon, replays=1, carry=False), standard.problem(s.epsilon)
    for _ in range(3):
        library_step(ours, free.solver(), s.model, s.batch, s.lr)
        library_step(theirs, standard.solver(), s.twin, s.batch, s.lr)
        assert all(torch.equal(p, q) for p, q in zip(s.model.parameters(), s.twin.parameters(), strict=True))


@given(s=scenes(), before=st.integers(0, 3), carry=st.booleans())
def test_free_at_continues_from_its_state(s, before, carry):
    first = free.problem(s.epsilon, replays=2, carry=carry)
    for _ in range(before):
        library_step(first, free.solver(), s.model, s.batch, s.lr)
    second = free.problem(s.epsilon, replays=2, carry=carry)
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(first.state_dict())
    twin = copy.deepcopy(s.model)
    for _ in range(3):
        a = library_step(first, free.solver(), s.model, s.batch, s.lr)
        b = library_step(second, free.solver(), twin, s.batch, s.lr)
        assert torch.equal(a.solution.delta, b.solution.delta)
        assert all(torch.equal(p, q) for p, q in zip(s.model.parameters(), twin.parameters(), strict=True))
    again = free.problem(s.epsilon, replays=2, carry=carry)
    again.load_state_dict(state)  # the two runs above did not write into the state they were given
    assert again.lower.passes == before


# --- BETA -------------------------------------------------------------------------------------------------------------


def rmsprop_margins(model, x, y, starts, steps, lr, epsilon):
    """Algorithm 1: η_j for every j ≠ y of every example, and M_j there; lists ``[B][K − 1]`` in the order of j."""
    found = []
    for i, label in enumerate(y.tolist()):
        found.append([])
        others = [j for j in range(model(x[:1]).shape[1]) if j != label]
        for k, j in enumerate(others):

            def margin(eta, i=i, j=j, label=label):
                out = model(x[i : i + 1] + eta)
                return out[:, j] - out[:, label]

            eta, square = starts[i * len(others) + k][None], torch.zeros_like(x[:1])
            for _ in range(steps):  # RMSprop as Hinton's slides and torch have it: 0.99, 1e-8
                gradient = -input_gradient(margin, eta)
                square = 0.99 * square + 0.01 * gradient**2
                eta = clip(eta - lr * gradient / (square.sqrt() + 1e-8), x[i : i + 1], epsilon)
            found[-1].append((eta, margin(eta).item(), j))
    return found


def beta_starts(s):
    """Unif[max(x − ε, 0), min(x + ε, 1)], one per example and other class."""
    return uniform_start(s.x.repeat_interleave(s.classes - 1, 0), s.epsilon, seeded(s.seed))


beta_steps, beta_rates = st.integers(1, 3), st.floats(0.002, 0.05)


@given(s=scenes(max_size=3), steps=beta_steps, rate=beta_rates)
def test_beta(s, steps, rate):
    """Equations 20 to 22: the best class's perturbation, and cross-entropy there."""
    problem = beta.problem(s.epsilon, steps, rate)
    taken = library_step(problem, beta.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    found = rmsprop_margins(s.twin, s.x, s.y, beta_starts(s), steps, rate, s.epsilon)
    best = [max(row, key=lambda one: one[1]) for row in found]
    delta = torch.cat([eta for eta, _, _ in best])
    assert taken.solution.batch.target.tolist() == [j for _, _, j in best]
    torch.testing.assert_close(taken.solution.delta, delta, rtol=1e-8, atol=1e-11)
    descend_on(s.twin, ce(s.twin, s.x + delta, s.y).mean(), s.lr)
    assert_same(s.model, s.twin, rtol=1e-8, atol=1e-10)


def smooth_loss(model, x, y, found, mu, hold=False):
    """Line 9 of Algorithm 3, meaned over the batch; ``hold`` keeps the weights constant."""
    loss = torch.zeros((), dtype=F64)
    for i, row in enumerate(found):
        powers, losses = [], []
        for eta, _, j in row:
            out = model(x[i : i + 1] + eta)[0]
            power = torch.exp(mu * (out[j] - out[y[i]]))
            powers.append(power.detach() if hold else power)
            losses.append(out.logsumexp(0) - out[y[i]])
        weights = torch.stack(powers) / sum(powers)
        loss = loss + (weights * torch.stack(losses)).sum() / len(x)
    return loss


@given(s=scenes(max_size=3), steps=beta_steps, rate=beta_rates, mu=st.floats(0.1, 5.0))
def test_smooth_beta(s, steps, rate, mu):
    """Equation 34: weights e^{μM_j} / Σ e^{μM_j}, differentiated with the losses they multiply."""
    problem = smooth_beta.problem(s.epsilon, steps, rate, temperature=mu)
    library_step(problem, smooth_beta.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    found = rmsprop_margins(s.twin, s.x, s.y, beta_starts(s), steps, rate, s.epsilon)

    descend_on(s.twin, smooth_loss(s.twin, s.x, s.y, found, mu), s.lr)
    assert_same(s.model, s.twin, rtol=1e-8, atol=1e-10)


def test_smooth_beta_differentiates_its_weights():
    """So that the test above would notice if it did not."""
    model, batch = steep_network()
    found = rmsprop_margins(model, batch.x, batch.y, torch.zeros(12, 8, dtype=F64), 3, 0.02, 0.2)
    whole, held = (
        torch.autograd.grad(smooth_loss(model, batch.x, batch.y, found, 1.0, hold), list(model.parameters()))
        for hold in (False, True)
    )
    assert norm([a - b for a, b in zip(whole, held, strict=True)]) > 0.05 * norm(whole)


# --- TRADES and MART --------------------------------------------------------------------------------------------------


def kl(p_model, q_model):
    """Σ_k p_k (log p_k − log q_k) of softmax(logits), per sample."""
    log_p = p_model - p_model.logsumexp(1, keepdim=True)
    log_q = q_model - q_model.logsumexp(1, keepdim=True)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def gaussian_start(s):
    """0.001 · N(0, I), which the library projects before the first gradient."""
    noise = torch.randn(s.x.shape, generator=seeded(s.seed), dtype=F64)
    return clip(1e-3 * noise, s.x, s.epsilon)


@given(s=scenes(kinks=True), steps=st.integers(1, 3), weight=st.floats(0.1, 8.0))
def test_trades(s, steps, weight):
    """ℓ(x) + weight · KL(f(x) ‖ f(x + δ*)) with gradients through both arguments; δ* by sign steps up the KL."""
    problem = trades.problem(s.epsilon, weight, steps)
    taken = library_step(problem, trades.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    delta, reference = gaussian_start(s), s.twin(s.x).detach()
    for _ in range(steps):
        gradient = input_gradient(lambda at: kl(reference, s.twin(at)), s.x + delta)
        delta = clip(delta + s.epsilon / 4 * gradient.sign(), s.x, s.epsilon)
    torch.testing.assert_close(taken.solution.delta, delta, rtol=1e-12, atol=1e-14)
    loss = ce(s.twin, s.x, s.y) + weight * kl(s.twin(s.x), s.twin(s.x + delta))
    descend_on(s.twin, loss.mean(), s.lr)
    assert_same(s.model, s.twin)


@given(s=scenes(kinks=True))
def test_trades_at_weight_0_is_standard_training(s):
    library_step(trades.problem(s.epsilon, weight=0.0, steps=2), trades.solver(), s.model, s.batch, s.lr, seeded(0))
    library_step(standard.problem(s.epsilon), standard.solver(), s.twin, s.batch, s.lr)
    assert all(torch.equal(p, q) for p, q in zip(s.model.parameters(), s.twin.parameters(), strict=True))


def boosted(p, y):
    """BCE: −log p_y − log(1 − max_{k≠y} p_k)."""
    own = p.gather(1, y[:, None])[:, 0]
    rival = torch.stack([torch.cat([row[:j], row[j + 1 :]]).max() for row, j in zip(p, y.tolist(), strict=True)])
    return -own.log() - (1 - rival).log()


@pytest.mark.parametrize("weight", [0.0, 5.0, None])
@given(s=scenes(kinks=True), steps=st.integers(1, 3), drawn=st.floats(0.1, 8.0))
def test_mart(weight, s, steps, drawn):
    """BCE(x + δ*) + weight · KL(p(x) ‖ p(x + δ*)) · (1 − p_y(x)); at weight 0 BCE alone."""
    weight = drawn if weight is None else weight
    problem = mart.problem(s.epsilon, weight, steps)
    taken = library_step(problem, mart.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    delta = gaussian_start(s)
    for _ in range(steps):
        delta = sign_step(s.twin, s.x, s.y, delta, s.epsilon / 4, s.epsilon)
    torch.testing.assert_close(taken.solution.delta, delta, rtol=1e-12, atol=1e-14)
    clean, moved = s.twin(s.x), s.twin(s.x + delta)
    loss = boosted(moved.softmax(1), s.y)
    if weight:
        loss = loss + weight * kl(clean, moved) * (1 - clean.softmax(1).gather(1, s.y[:, None])[:, 0])
    torch.testing.assert_close(taken.losses, loss.detach(), rtol=1e-9, atol=1e-12)
    descend_on(s.twin, loss.mean(), s.lr)
    assert_same(s.model, s.twin, rtol=1e-8, atol=1e-10)


# --- the training loop ------------------------------------------------------------------------------------------------


def images(n=22, side=3, classes=3, seed=0):
    g = seeded(seed)
    return Images(
        torch.rand((n, 1, side, side), generator=g, dtype=F64), torch.randint(0, classes, (n,), generator=g), 3
    )


def dense_network(seed=0, dtype=F64):
    torch.manual_seed(seed)
    layers = [torch.nn.Flatten(), torch.nn.Linear(9, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)]
    return torch.nn.Sequential(*layers).to(dtype)


def trained(problem, recipe, model, epochs=1, data=None, seed=4):
    """A trainer after so many epochs."""
    data = images() if data is None else data
    trainer = Trainer(problem, ZeroIG(), model, data, data, recipe, attack_from_name("clean", 0.1), seed)
    for epoch in range(epochs):
        trainer.train_epoch(epoch)
    return trainer


PLAIN = Recipe(epochs=2, batch_size=8, lr=0.2, schedule="constant", momentum=0.9, weight_decay=1e-3)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)


@pytest.mark.parametrize("replays", [1, 3])
def test_the_trainer_replays_each_batch(replays):
    """m updates of θ on a batch before the next one; δ is carried, and a short batch uses its first rows."""
    model, epsilon = dense_network(), 0.1
    twin = copy.deepcopy(model)
    trainer = trained(free.problem(epsilon, replays), PLAIN, model, epochs=2)
    assert trainer.steps_per_epoch == 3 * replays
    optimizer, delta = sgd(twin), torch.zeros(8, 1, 3, 3, dtype=F64)
    loader, updates = Loader(images(), 8, seed=4), 0
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            for _ in range(replays):
                rows = len(batch)
                used = clip(delta[:rows], batch.x, epsilon)
                at = (batch.x + used).requires_grad_()
                optimizer.zero_grad()
                ce(twin, at, batch.y).mean().backward()
                optimizer.step()
                delta[:rows] = (delta[:rows] + epsilon * at.grad.sign()).clamp(-epsilon, epsilon)
                updates += 1
    assert updates == 2 * trainer.steps_per_epoch
    assert_same(model, twin)


@pytest.mark.parametrize(
    "problem", [lambda: standard.problem(0.1), lambda: fgsm.problem(0.1)], ids=["standard", "fgsm"]
)
@pytest.mark.parametrize("n", [22, 24])
def test_accumulated_batches_are_one_large_batch(problem, n):
    """Without batch norm; with 22 examples the last group is a batch of 4 and one of 2, and their weights differ."""
    data = images(n)
    data = Images(data.x.float(), data.y, 3)
    small, large = dense_network(dtype=torch.float32), dense_network(dtype=torch.float32)
    untouched = copy.deepcopy(small)
    trained(problem(), replace(PLAIN, batch_size=4, accumulate=4), small, data=data)
    one = trained(problem(), replace(PLAIN, batch_size=16), large, data=data)
    assert one.steps_per_epoch == 2
    assert_same(small, large, rtol=1e-4, atol=1e-6)
    assert_moved(small, untouched)
    wrong = dense_network(dtype=torch.float32)
    trained(problem(), replace(PLAIN, batch_size=4), wrong, data=data)
    with pytest.raises(AssertionError):
        assert_same(wrong, large, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_moving_average_is_the_recursion(decay):
    """a_1 = θ_1, a_t = decay · a_{t−1} + (1 − decay) · θ_t, after every update."""
    model = dense_network()
    twin = copy.deepcopy(model)
    trainer = trained(fgsm.problem(0.1), replace(PLAIN, ema=decay), model, epochs=2)
    optimizer, average = sgd(twin), None
    loader = Loader(images(), 8, seed=4)
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            delta = sign_step(twin, batch.x, batch.y, torch.zeros_like(batch.x), 0.1, 0.1)
            optimizer.zero_grad()
            ce(twin, batch.x + delta, batch.y).mean().backward()
            optimizer.step()
            now = [p.detach().clone() for p in twin.parameters()]
            average = (
                now if average is None else [decay * a + (1 - decay) * p for a, p in zip(average, now, strict=True)]
            )
    assert_same(model, twin)
    assert trainer.evaluated is not model
    for got, want in zip(trainer.evaluated.parameters(), average, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert_moved(trainer.evaluated, model)


def lines(robust, train, perturbation=0.03):
    return [
        {"epoch": i + 1, "robust": r, "train": t, "perturbation": perturbation, "attack": "pgd-10"}
        for i, (r, t) in enumerate(zip(robust, train, strict=True))
    ]


@pytest.mark.parametrize(
    ("robust", "train", "perturbation", "found"),
    [
        ([0.30, 0.40, 0.45, 0.02], [0.40, 0.50, 0.55, 0.90], 0.03, (3, 4)),  # collapse, from the best epoch
        ([0.30, 0.40, 0.03, 0.02], [0.40, 0.50, 0.80, 0.90], 0.03, (2, 3)),  # the first epoch of it
        ([0.30, 0.45, 0.02, 0.46], [0.40, 0.55, 0.90, 0.60], 0.03, (2, 3)),  # recovered since: it happened all the same
        ([0.30, 0.40, 0.45, 0.43], [0.40, 0.50, 0.55, 0.60], 0.03, None),  # robust overfitting is another thing
        ([0.30, 0.40, 0.45, 0.02], [0.40, 0.50, 0.55, 0.30], 0.03, None),  # everything got worse: divergence
        ([0.30, 0.40, 0.45, 0.02], [0.40, 0.50, 0.55, 0.90], 0.0, None),  # standard training has nothing to lose
        ([0.05, 0.01], [0.3, 0.9], 0.03, None),  # never robust by as much as could be lost
        ([], [], 0.03, None),
        ([0.4], [0.5], 0.03, None),
    ],
)
def test_catastrophic_overfitting(robust, train, perturbation, found):
    collapse = catastrophic_overfitting(lines(robust, train, perturbation))
    assert (None if collapse is None else (collapse.before["epoch"], collapse.after["epoch"])) == found
    if collapse is not None:
        assert f"epoch {found[1]}" in str(collapse) and "pgd-10" in str(collapse)


def test_the_last_good_epoch_is_the_one_before_the_fall():
    """Training accuracy may rise an epoch or two after robustness is gone; the weights to keep are from before it."""
    metrics = lines([0.40, 0.10, 0.02], [0.50, 0.45, 0.90])
    collapse = catastrophic_overfitting(metrics)
    assert (collapse.before["epoch"], collapse.after["epoch"], collapse.last_good) == (1, 3, 1)
    assert [last_is_first_to_fall(metrics[:n]) for n in range(4)] == [False, False, True, False]
    again = lines([0.40, 0.10, 0.38, 0.35, 0.02], [0.50, 0.45, 0.50, 0.55, 0.90])  # it recovers, and then is lost
    assert catastrophic_overfitting(again).last_good == 4
    assert [last_is_first_to_fall(again[:n]) for n in range(6)] == [False, False, True, False, False, True]


def test_free_at_passes_the_check():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()
    batch = ba.Batch(torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    problem = free.problem(epsilon=0.1)
    ZeroIG().hypergradient(problem, model, batch)  # so that something is carried
    for solver in (ZeroIG(), HessianFreeKKT(), FullKKT()):
        assert hypergradcheck(problem, solver, model, batch)


# --- mixed precision --------------------------------------------------------------------------------------------------

# A bfloat16 number has 8 significant bits, so a rounding errs by at most u = 2⁻⁸ of the number. In a network of three
# layers a value on its way from the input to a parameter's gradient is rounded at most 3 × 3 times forward (input,
# weights and output of each layer) and 3 × 3 times backward. Errors of different entries are independent and add up in
# squares: √18 u = 1.7 % of the norm (18 u = 7 % were they all to point the same way). A double backward pass is twice
# as long, √36 u = 2.3 %, and decides besides which coordinates are free, which matters little where few are near a
# bound. A loss in which numbers nearly cancel, such as a divergence of two close outputs, has no such bound.
U = 2.0**-8
FIRST, SECOND = math.sqrt(18) * U, math.sqrt(36) * U


def small_convolutional(seed):
    torch.manual_seed(seed)
    layers = [torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Softplus(), torch.nn.Conv2d(8, 8, 3, stride=2)]
    layers += [torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.Linear(8 * 9, 4)]
    return torch.nn.Sequential(*layers), ba.Batch(torch.rand(16, 1, 8, 8), torch.randint(0, 4, (16,)))


def relative_error(model, gradients):
    """‖g16 − g64‖ / ‖g64‖ over all parameters."""
    got = [p.grad.double() for p in model.parameters()]
    return norm([a - b for a, b in zip(got, gradients, strict=True)]) / norm(gradients)


def under_autocast(problem, solver, model, batch, anchor=None):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = solver.backward(problem, model, batch, anchor=anchor, generator=seeded(0))
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
    assert step.solution.delta.dtype == torch.float32 and step.solution.anchor.dtype == torch.float32
    return step


@pytest.mark.parametrize("file", [standard, fastat, fgsm, minmax])
def test_bfloat16_upper_gradients(file):
    """At the same δ*: near a zero gradient a sign is a coin, so δ* itself is compared in no precision but its own."""
    worst = 0.0
    for seed in range(5):
        model, batch = small_convolutional(seed)
        exact = copy.deepcopy(model).double()
        problem = file.problem(0.1)
        step = under_autocast(problem, file.solver(), model, batch)
        x, delta = batch.x.double(), step.solution.delta.double()
        low, high = box(x, 0.1)
        assert ((delta >= low - 1e-6) & (delta <= high + 1e-6)).all()
        loss = problem.upper.loss(exact, ba.Batch(x, batch.y), delta).mean()
        worst = max(worst, relative_error(model, torch.autograd.grad(loss, list(exact.parameters()))))
    print(f"bfloat16, {file.__name__}: {worst:.4f} (bound {FIRST:.4f})")
    assert worst <= FIRST


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
