"""Problems that are wrong in the ways in which people's are, each with the name that hypergradcheck has for it.

What each looks like in a user's file: a criterion, an attack loss, a lower problem, an anchor, a constraint.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from networks import ATK
from torch import nn

import bilevel_at as ba
from bilevel_at.solution import Solution


def taylor(upper=None, attack_loss=ATK, constraint=None, **more):
    lower = ba.Linearized(attack_loss, constraint or ba.LinfBall(0.3), "zero", "taylor", 0.5, **more)
    return ba.BilevelProblem(upper or ba.UpperProblem(), lower)


def loss_of(function):
    """A criterion that is the cross-entropy after ``function`` has done its mischief to ``(model, batch, delta)``."""

    def criterion(model, batch, delta):
        value = function(model, batch, delta)
        plain = ba.cross_entropy(model, batch, delta)
        return plain if value is None else plain + value

    return criterion


class OwnLower(ba.LowerProblem):
    """g = ⟨W(θ) x-ish, δ⟩ + λ/2 ‖δ‖², by hand: what a user's own closed form looks like."""

    lam = 2.0
    told = 2.0

    def __init__(self):
        self.constraint = ba.LinfBall(0.3)
        self.anchor = "zero"

    def slope(self, model, batch):
        x = batch.x.detach().clone().requires_grad_()
        loss = ATK(model, ba.Batch(x, batch.y), torch.zeros_like(x)).sum()
        return torch.autograd.grad(loss, x, create_graph=True)[0]

    def objective(self, model, batch, delta, anchor):
        moved = (delta - anchor).flatten(1)
        return (self.slope(model, batch).flatten(1) * moved).sum(1) + self.lam / 2 * moved.square().sum(1)

    def minimiser(self, slope, anchor):
        return anchor - slope / self.lam

    def solve_at(self, model, batch, anchor, differentiable):
        slope = self.slope(model, batch)
        delta = self.constraint.project(self.minimiser(slope.detach(), anchor), batch.x)
        gradient = self.claimed(slope, delta, anchor) if differentiable else None
        return Solution(delta, anchor, batch, lam=self.told, gradient=gradient)

    def claimed(self, slope, delta, anchor):
        return slope + self.lam * (delta - anchor)

    def curvature(self, model, solution):
        return None, solution.lam


class WrongSign(OwnLower):
    def minimiser(self, slope, anchor):
        return anchor + slope / self.lam


class WrongGradient(OwnLower):
    """On a sphere, whose multiplier is read from the gradient; a box does not look at its value."""

    lam = told = 0.5

    def __init__(self):
        super().__init__()
        self.constraint = ba.L2Ball(0.1, bounds=None)

    def claimed(self, slope, delta, anchor):
        return slope


class WrongLam(OwnLower):
    told = 4.0


class StepsTooShort(OwnLower):
    def minimiser(self, slope, anchor):
        return anchor - 0.5 * slope / self.lam


class Unprojected(OwnLower):
    def solve_at(self, model, batch, anchor, differentiable):
        slope = self.slope(model, batch)
        delta = anchor - 100 * slope.detach()
        return Solution(delta, anchor, batch, lam=self.lam, gradient=self.claimed(slope, delta, anchor))


class OwnAnchor(OwnLower):
    """Starts from an anchor of its own that moves with θ, and hands on that."""

    def solve_at(self, model, batch, anchor, differentiable):
        return super().solve_at(model, batch, 0.3 * self.slope(model, batch).detach(), differentiable)


class MovingBase(OwnLower):
    """The input range follows the network."""

    def base(self, model, batch):
        return (batch.x * (1 + 0.1 * model[1].weight.sum())).clamp(0.01, 0.99)

    def solve_at(self, model, batch, anchor, differentiable):
        slope = self.slope(model, batch)
        base = self.base(model, batch).detach()
        delta = self.constraint.project(self.minimiser(4 * slope.detach(), anchor), base)
        gradient = 4 * slope + self.lam * (delta - anchor) if differentiable else None
        return Solution(delta, anchor, batch, lam=self.lam, gradient=gradient)

    def objective(self, model, batch, delta, anchor):
        moved = (delta - anchor).flatten(1)
        return (4 * self.slope(model, batch).flatten(1) * moved).sum(1) + self.lam / 2 * moved.square().sum(1)


def own(lower):
    return ba.BilevelProblem(ba.UpperProblem(), lower)


class Counting(ba.UpperProblem):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def loss_at(self, model, batch, solution, generator=None):
        self.calls += 1
        return super().loss_at(model, batch, solution, generator) * (1 + 0.01 * self.calls)


class Closure(ba.UpperProblem):
    """Counts in a place that has no name."""

    def __init__(self):
        super().__init__()
        calls = []
        self.weight = lambda: calls.append(0) or 1 + 0.01 * len(calls)

    def loss_at(self, model, batch, solution, generator=None):
        return super().loss_at(model, batch, solution, generator) * self.weight()


class HalfMasked(ba.LinfBall):
    """A ball whose active set forgets the upper bounds."""

    def active(self, delta, x, gradient=None):
        found = super().active(delta, x, gradient)
        return ba.constraints.ActiveSet(found.free | (delta > 0))


def edits_x(model, batch, delta):
    batch.x.add_(1e-3)


def edits_delta(model, batch, delta):
    delta.detach().mul_(0.9)


def normalises_weights(model, batch, delta):
    weight = model[1].weight
    weight.data.div_(weight.data.norm())


def fills_grad(model, batch, delta):
    ba.cross_entropy(model, batch, delta.detach()).sum().backward()


def norm_penalty(model, batch, delta):
    return 0.1 * sum(p.detach().square().sum() for p in model.parameters())


def numpy_penalty(model, batch, delta):
    return 0.1 * float(np.square(model[1].weight.detach().numpy()).sum())


def logit_penalty(model, batch, delta):
    with torch.no_grad():
        return model(batch.x + delta).square().sum(1)


def detached_scale(model, batch, delta):
    """An attack loss whose weight depends on θ without a graph."""
    return ATK(model, batch, delta) * model[1].weight.detach().norm()


def through_numpy(model, batch, delta):
    """An attack loss with a term that was made by NumPy: its slope in δ is θ's, without a graph."""
    direction = torch.from_numpy(np.tanh(model[1].weight.detach().numpy()).sum(0))
    return ATK(model, batch, delta) + (delta.flatten(1) * direction).sum(1)


def relu():
    """A network with a unit that is at its kink."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[1].weight[0] = 0.0
        model[1].bias[0] = 0.0
        model[3].weight[:, 0] = torch.tensor([1.0, -2.0, 3.0])
    return model


def upper(term):
    return taylor(ba.UpperProblem(loss_of(term)))


def noisy(draw):
    return upper(lambda model, batch, delta: 1e-3 * draw())


WRONG = {
    # name of the mistake: (cause, words of the message, problem, solver)
    "noise of torch's own": ("hidden randomness", "torch's global", lambda: noisy(lambda: torch.randn(()).item())),
    "noise of NumPy's": ("hidden randomness", "numpy", lambda: noisy(lambda: np.random.rand())),  # noqa: NPY002
    "noise of Python's": ("hidden randomness", "Python's", lambda: noisy(random.random)),
    "a counter": ("hidden state", "upper.calls", lambda: taylor(Counting())),
    "a counter in a closure": ("hidden state", "outside its attributes", lambda: taylor(Closure())),
    "an edit of x": ("edit in place", "batch.x", lambda: upper(edits_x)),
    "an edit of θ": (
        "edit in place",
        "parameter 1.weight",
        lambda: upper(normalises_weights),
    ),
    "backward() in a loss": ("fills .grad", "backward", lambda: upper(fills_grad)),
    "a mean over the batch": (
        "mean over samples",
        "4 samples",
        lambda: taylor(attack_loss=lambda m, b, d: ATK(m, b, d).mean()),
    ),
    "δ* not projected": ("infeasible", "outside", lambda: own(Unprojected())),
    "a detached penalty": ("upper term without θ", "detached", lambda: upper(norm_penalty)),
    "a penalty of NumPy's": ("upper term without θ", "NumPy", lambda: upper(numpy_penalty)),
    "a penalty in no_grad": (
        "upper term without θ",
        "no_grad",
        lambda: upper(logit_penalty),
    ),
    "a detached attack": ("attack term without θ", "detached", lambda: taylor(attack_loss=detached_scale)),
    "an attack of NumPy's": ("attack term without θ", "NumPy", lambda: taylor(attack_loss=through_numpy)),
    "an attacker who helps": ("not a minimiser", "solve_at", lambda: own(WrongSign())),
    "half a step": ("not a minimiser", "stops early", lambda: own(StepsTooShort())),
    "∇g without its λ": ("∇g", "solution.gradient", lambda: own(WrongGradient())),
    "twice the λ": ("λ", "2 times", lambda: own(WrongLam())),
    "an anchor of its own": ("anchor depends on θ", "solution.anchor", lambda: own(OwnAnchor())),
    "a range that follows θ": ("constraint depends on θ", "base", lambda: own(MovingBase())),
    "an active set of its own": ("active set", "active()", lambda: taylor(constraint=HalfMasked(0.05))),
}
