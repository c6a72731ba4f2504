"""SGD_BCA (ATAS paper, section IV): stochastic gradient descent in θ, block coordinate ascent in the perturbations.

    δ*_i = P_C(z_i + step · ∇_δ ℓ(θ, z_i)),    z_i = δ*_i of the last time example i was drawn
    θ ← θ − η_θ ∇_θ ℓ(θ, δ*_i)

The form of ATTA for which the paper proves a regret bound (Theorem IV.2): the gradient itself, not its sign.

There are no published settings: this is theory. Training is ATTA's (atta.py), perturbations are never redrawn, and the
step, which multiplies the gradient of one sample, is Fast-BAT's for ε ≤ 8/255: 5000/255, and 20 on the digits.

When to use it: to see the theory's algorithm at work. Its step multiplies the gradient itself, so it depends on the
scale of the gradients; to train a network, take atta.py.
"""

from __future__ import annotations

import bilevel_at as ba
from bilevel_at.modes import Mode
from bilevel_at.problems import atta
from bilevel_at.runs.recipe import DIGITS, Recipe
from bilevel_at.solvers import ZeroIG


def problem(
    epsilon: float = 8 / 255,
    step: float = 5000 / 255,
    size: int | None = None,
    label_smoothing: float = 0.0,
    mode: Mode = "eval",
) -> ba.BilevelProblem:
    """Gradient steps from remembered perturbations in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        step: η_x, which multiplies the gradient.
        size: keep perturbations resized to size × size; at full size if not given.
        label_smoothing: share of the label that is spread over all classes, for both players.
        mode: train or eval batch statistics in attack passes.
    """
    anchor = ba.Remembered(size=size)
    loss = ba.CrossEntropy(label_smoothing)
    lower = ba.Linearized(ba.minus(loss), ba.LinfBall(epsilon), anchor, "taylor", step, mode)
    return ba.BilevelProblem(ba.UpperProblem(loss), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    return {**atta.recipe(), "digits": DIGITS.playing(step=20.0)}
