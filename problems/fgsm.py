"""FGSM training (Goodfellow et al., 2015): one sign step, from any start and of any length.

    min_θ  mean_i ℓ_CE(θ, δ*_i)
    δ* = argmin_{δ ∈ C} ⟨sign ∇_δ ℓ_atk(θ, z), δ − z⟩ + λ/2 ‖δ − z‖² = P_C(z − step · sign ∇_δ ℓ_atk(θ, z))

with ℓ_atk = −ℓ_CE and λ = 1/step (Fast-BAT paper, equations 5 and 6). The implicit gradient is zero almost everywhere
(equation 7). From z = 0 with step ε it is FGSM; fastat.py is the same from a uniform draw.

Published settings: z = 0, step ε; training as for Fast-AT (GradAlign paper, section 5, trains it for 30 epochs). At
large ε it overfits catastrophically (GradAlign paper, Figure 1).

When to use it: to study catastrophic overfitting, or as any one-step method by ``--start`` and ``--step``. To train a
network, take fastat.py or nfgsm.py.
"""

from __future__ import annotations

from typing import Literal

import bilevel_at as ba
from bilevel_at.modes import Mode
from bilevel_at.problems.fastat import Draw, uniform
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.solvers import ZeroIG


def problem(
    epsilon: float = 8 / 255,
    start: Literal["zero", "uniform", "corner"] = "zero",
    step: float | None = None,
    draw: Draw = "cube",
    label_smoothing: float = 0.0,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """One sign step in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        start: the anchor z.
        step: length of the sign step, ε if not given.
        draw: a uniform start is drawn in the cube [−ε, ε]^d and then clipped to the input range, or in the set C.
        label_smoothing: share of the label that is spread over all classes, for both players.
        mode: train or eval batch statistics in attack passes.
    """
    step = epsilon if step is None else step
    anchor = uniform(epsilon, draw) if start == "uniform" else start
    loss = ba.CrossEntropy(label_smoothing)
    lower = ba.Linearized(ba.minus(loss), ba.LinfBall(epsilon), anchor, "sign", step, mode)
    return ba.BilevelProblem(ba.UpperProblem(loss), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    return {"digits": DIGITS, "cifar10": CIFAR}
