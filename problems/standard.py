"""Standard training: the attacker stays at δ = 0. The reference that adversarial training is compared with.

    min_θ  mean_i ℓ_CE(θ, x_i)

The feasible set takes no part in training; it is the threat that the trained network is evaluated under.

When to use it: as the reference for clean accuracy and for cost. It is not robust.
"""

from __future__ import annotations

import bilevel_at as ba
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.solvers import ZeroIG


def problem(epsilon: float = 8 / 255, label_smoothing: float = 0.0) -> ba.BilevelProblem:
    """No attack in training.

    Args:
        epsilon: radius ε of the ℓ∞ ball in which the trained network is evaluated.
        label_smoothing: share of the label that is spread over all classes.
    """
    loss = ba.CrossEntropy(label_smoothing)
    return ba.BilevelProblem(ba.UpperProblem(loss), ba.AtAnchor(ba.LinfBall(epsilon), "zero"))


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    return {"digits": DIGITS, "cifar10": CIFAR}
