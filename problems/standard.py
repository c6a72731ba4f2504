"""Standard training: the attacker stays at δ = 0. The reference that adversarial training is compared with.

    min_θ  mean_i ℓ_CE(θ, x_i)

The feasible set takes no part in training; it says where the trained network is attacked in evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.solvers import ZeroIG
from bilevel_at.train import CIFAR, DIGITS, Recipe


class NoAttack(ba.LowerProblem):
    """g = λ/2 ‖δ‖² with λ = 1, whose solution is 0 in every set that contains it."""

    hessian_is_lam = True

    def __init__(self, constraint: ba.Constraint) -> None:
        self.constraint = constraint

    def objective(self, model: nn.Module, batch: ba.Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        return delta.flatten(1).square().sum(1) / 2

    def solve(
        self,
        model: nn.Module,
        batch: ba.Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ba.Solution:
        zero = torch.zeros_like(batch.x)
        return ba.Solution(zero, zero, batch, lam=1.0)


def problem(epsilon: float = 8 / 255) -> ba.BilevelProblem:
    """No attack in training.

    Args:
        epsilon: radius ε of the ℓ∞ ball in which the trained network is evaluated.
    """
    return ba.BilevelProblem(ba.UpperProblem(), NoAttack(ba.LinfBall(epsilon)))


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    return {"digits": DIGITS, "cifar10": CIFAR}
