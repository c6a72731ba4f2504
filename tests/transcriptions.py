"""What the transcriptions of published methods share: losses, projections and draws with plain autograd in float64.

They share nothing with the library but the network: losses are spelled out, projections are clamps, and draws are
repeated from a generator in the same state. Equation numbers are those of the papers the problem files cite.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

import bilevel_at as ba
from bilevel_at.testing import strategies as bst

F64 = torch.float64


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


def cube_start(x, epsilon, generator):
    """U[−ε, ε]^d, then clipped to the input range, as published code has it."""
    noise = uniform_noise(x.shape, epsilon, generator).to(x)
    return torch.minimum(torch.maximum(noise, -x), 1 - x)


STARTS = {"cube": cube_start, "set": uniform_start}
"""What a problem's ``draw`` means; "cube" is the default."""


def drawing(draw):
    """The arguments that ask for it: none for the default."""
    return {} if draw == "cube" else {"draw": draw}


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


def norm(gradients):
    return math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))


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


bat_weights = st.floats(0.3, 2.0)


def steep_network(seed=0, d=8, classes=3):
    torch.manual_seed(seed)
    layers = [torch.nn.Flatten(), torch.nn.Linear(d, 12), torch.nn.Tanh(), torch.nn.Linear(12, classes)]
    model = torch.nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2.5
    return model, ba.Batch(torch.rand(6, d, dtype=F64), torch.randint(0, classes, (6,)), torch.arange(6))


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


class Memory:
    """x_i^{j−1} of Algorithm 1 as δ, v_i and v̂_i, for every example."""

    def __init__(self, n, epsilon, generator):
        self.delta = [None] * n
        self.v, self.largest = torch.zeros(n, dtype=F64), torch.zeros(n, dtype=F64)
        self.epsilon, self.generator = epsilon, generator

    def start(self, batch):
        """z_i: the stored perturbation of each example, or Uniform(−ε, ε), projected."""
        # The library draws for the whole batch whatever is known of it.
        fresh = uniform_noise(batch.x.shape, self.epsilon, self.generator)
        rows = [
            new if self.delta[i] is None else self.delta[i] for i, new in zip(batch.index.tolist(), fresh, strict=True)
        ]
        return clip(torch.stack(rows), batch.x, self.epsilon)

    def store(self, batch, delta):
        for i, row in zip(batch.index.tolist(), delta, strict=True):
            self.delta[i] = row

    def follow(self, index, gradient, momentum):
        """v_i ← β v_i + (1 − β) ‖∇ℓ‖² and v̂_i ← max(v̂_i, v_i)."""
        self.v[index] = momentum * self.v[index] + (1 - momentum) * gradient.flatten(1).norm(dim=1) ** 2
        self.largest[index] = torch.maximum(self.largest[index], self.v[index])
        return self.v[index]


def play(v, problem, solver, update, epochs=3, rtol=1e-9, atol=1e-11):
    """Train both copies side by side on what ``update(memory, batch, epoch)`` says δ* is."""
    generator = seeded(v.seed + 1)
    memory = Memory(len(v.x), v.epsilon, seeded(v.seed + 1))
    for epoch, index in v.epochs(epochs):
        problem.set_epoch(epoch, 30)
        batch = v.batch(index)
        step = library_step(problem, solver, v.model, batch, v.lr, generator)
        delta = update(memory, batch, epoch)
        torch.testing.assert_close(step.solution.delta, delta, rtol=rtol, atol=atol)
        descend_on(v.twin, ce(v.twin, batch.x + delta, batch.y).mean(), v.lr)
        assert_same(v.model, v.twin, rtol, atol)
    return memory


def gaussian_start(s, clipped=False):
    """0.001 · N(0, I); ``clipped``: projected before the first gradient."""
    noise = 1e-3 * torch.randn(s.x.shape, generator=seeded(s.seed), dtype=F64)
    return clip(noise, s.x, s.epsilon) if clipped else noise


def kl(p_model, q_model):
    """Σ_k p_k (log p_k − log q_k) of softmax(logits), per sample."""
    log_p = p_model - p_model.logsumexp(1, keepdim=True)
    log_q = q_model - q_model.logsumexp(1, keepdim=True)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def rmsprop_margins(model, x, y, starts, steps, lr, epsilon):
    """Algorithm 1: η_j for every j ≠ y of every example, and M_j there; lists ``[B][K − 1]`` in the order of j."""
    attacks = []
    for i, label in enumerate(y.tolist()):
        attacks.append([])
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
            attacks[-1].append((eta, margin(eta).item(), j))
    return attacks


def beta_starts(s):
    """Unif[max(x − ε, 0), min(x + ε, 1)], one per example and other class."""
    return uniform_start(s.x.repeat_interleave(s.classes - 1, 0), s.epsilon, seeded(s.seed))


beta_steps, beta_rates = st.integers(1, 3), st.floats(0.002, 0.05)


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
        step = solver.hypergradient(problem, model, batch, anchor=anchor, generator=seeded(0))
        step.add_to(model)
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
    assert step.solution.delta.dtype == torch.float32 and step.solution.anchor.dtype == torch.float32
    return step
