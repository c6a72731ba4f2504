"""What plain loops over published formulas share: a network with batch normalisation, its batches and updates."""

from __future__ import annotations

import torch
from torch import nn

import bilevel_at as ba
from bilevel_at.solvers import ZeroIG

EPS, CLASSES = 0.1, 3


def network():
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES)]
    return nn.Sequential(*layers).double().train()


def batches(count, size=5):
    """Batches of eight examples, some of which come again."""
    g = torch.Generator().manual_seed(3)
    for _ in range(count):
        index = torch.randperm(8, generator=g)[:size]
        x = torch.rand((8, 1, 4, 4), generator=torch.Generator().manual_seed(4), dtype=torch.float64)[index]
        yield ba.Batch(x, index % CLASSES, index)


def update(model, gradients, rate=0.1):
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p -= rate * g


def descend(model, loss, rate=0.1):
    """One step of gradient descent on a number."""
    update(model, torch.autograd.grad(loss, list(model.parameters())), rate)


def train(problem, solver, model, count=3, generator=None):
    for batch in batches(count):
        step = solver.backward(problem, model, batch, generator)
        update(model, [p.grad for p in model.parameters()])
        model.zero_grad()
    return step


def follow(problem, model, count=3, seed=7):
    """Train under ZeroIG, with draws that ``torch.Generator().manual_seed(seed)`` repeats."""
    return train(problem, ZeroIG(), model, count, torch.Generator().manual_seed(seed))


def grad(value, at):
    return torch.autograd.grad(value, at, retain_graph=True)[0]


def in_ball(delta, x):
    return torch.clamp(x + delta.clamp(-EPS, EPS), 0, 1) - x


def in_range(delta, x):
    return torch.clamp(x + delta, 0, 1) - x


def noise(x, radius, generator):
    """U[−radius, radius]^d."""
    return (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1) * radius


def corner(x, radius, generator):
    """±radius, every sign a fair coin."""
    return radius * torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1.0, 1.0).double()


def cross_entropy(output, targets):
    """−Σ_k t_k log softmax(output)_k, per sample."""
    return -(targets * (output - output.logsumexp(1, keepdim=True))).sum(1)


def one_hot(y, share=1.0, elsewhere=0.0):
    """``share`` on the label and ``elsewhere`` on every other class."""
    rows = torch.full((len(y), CLASSES), elsewhere, dtype=torch.float64)
    rows[torch.arange(len(y)), y] = share
    return rows


def assert_same(model, twin):
    """Weights and running statistics."""
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")
