"""A-SGD_BCA (ATAS paper, section IV): SGD_BCA with a preconditioner for every example that never decreases.

    v_i ← β v_i + (1 − β) ‖∇_δ ℓ(θ, z_i)‖²            v̂_i ← max(v̂_i, v_i)
    δ*_i = P_C(z_i + η_x / √v̂_i · ∇_δ ℓ(θ, z_i)),     z_i = δ*_i of the last time example i was drawn
    θ ← θ − η_θ ∇_θ ℓ(θ, δ*_i)

The form of ATAS for which the paper proves a regret bound (Theorem IV.1): no sign, no clipping, and v̂ where ATAS has
v, without which the proof does not go through. (The displayed update divides by √v; the text and the theorem mean v̂.)

There are no published settings: this is theory. Training is ATTA's (atta.py) and β ATAS'. An update is η_x √(1/(1−β))
long the first time, in ℓ2; η_x is ε√d, the length of a sign step of ε, for the d = 3072 values of a CIFAR image, and
64 on the digits.

When to use it: to see the theory's algorithm at work. To train a network, take atas.py, which does better on the
digits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import bilevel_at as ba
from bilevel_at.modes import Mode
from bilevel_at.policy import number
from bilevel_at.problems import atta
from bilevel_at.runs.recipe import DIGITS, Recipe
from bilevel_at.solvers import ZeroIG

TINY = 1e-12  # keeps the step finite where a gradient is zero


class NeverLonger(ba.Adaptive):
    """γ / (c + √v̂_i) with v̂_i ← max(v̂_i, v_i), so that an example's steps never grow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.largest = ba.SampleMemory()

    def size(self, batch: ba.Batch, gradient: Tensor) -> Tensor:
        return number(self.gamma) / (self.c + self._largest(batch, gradient).sqrt())

    def _largest(self, batch: ba.Batch, gradient: Tensor) -> Tensor:
        v = self.square(batch, gradient)
        return torch.maximum(v, self.largest.read(batch, torch.zeros_like(v)))

    def observe(self, step: ba.Hypergradient) -> None:
        batch, gradient = step.solution.batch, step.solution.attack_gradient
        assert gradient is not None  # a linearised attacker always says
        v, largest = self.square(batch, gradient), self._largest(batch, gradient)
        self.memory.write(batch, v)
        self.largest.write(batch, largest)

    def state_dict(self) -> dict[str, Any]:
        return {"v": self.memory.state_dict(), "largest": self.largest.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["v"])
        self.largest.load_state_dict(state["largest"])


def problem(
    epsilon: float = 8 / 255,
    eta: float | None = None,
    beta: float = 0.5,
    size: int | None = None,
    label_smoothing: float = 0.0,
    mode: Mode = "eval",
) -> ba.BilevelProblem:
    """Gradient steps of adaptive length from remembered perturbations in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        eta: η_x, an ℓ2 length; ε√3072 if not given.
        beta: momentum of v.
        size: keep perturbations resized to size × size; at full size if not given.
        label_smoothing: share of the label that is spread over all classes, for both players.
        mode: train or eval batch statistics in attack passes.
    """
    length = epsilon * math.sqrt(3072) if eta is None else eta
    policy = NeverLonger(gamma=length, c=TINY, beta=beta)
    anchor = ba.Remembered(size=size)
    loss = ba.CrossEntropy(label_smoothing)
    lower = ba.Linearized(ba.minus(loss), ba.LinfBall(epsilon), anchor, "taylor", policy, mode)
    return ba.BilevelProblem(ba.UpperProblem(loss), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    training = atta.recipe()
    return {
        "digits": DIGITS.playing(eta=0.2 * 8),
        "cifar10": training["cifar10"],
        "imagenet": training["imagenet"].playing(eta=2 / 255 * 388),  # √(3 · 224²) = 388
    }
