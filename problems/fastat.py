"""Fast-AT (Wong et al., 2020) as a bilevel problem: one sign step from a uniform draw.

    min_θ  mean_i ℓ_CE(θ, δ*_i)
    δ* = argmin_{δ ∈ C} ⟨sign ∇_δ ℓ_atk(θ, z), δ − z⟩ + λ/2 ‖δ − z‖² = P_C(z − step · sign ∇_δ ℓ_atk(θ, z))

with ℓ_atk = −ℓ_CE, λ = 1/step and z uniform (Fast-BAT paper, equations 5 and 6). The implicit gradient is zero almost
everywhere (equation 7).

Published settings (Fast-BAT paper, section 5.1 and appendix C): step 1.25 ε; 20 epochs of batch 128, SGD with
momentum 0.9 and weight decay 5e-4, rate 0 → 0.2 → 0 linearly; in the authors' code the model is in train mode
throughout, z is drawn uniformly in [−ε, ε]^d and then clipped to the input range (``--draw set``: uniform in C), and
PyTorch's CyclicLR moves the momentum from 0.9 to 0.8 and back, opposite to the rate (``--peak-momentum 0.9``: not).

When to use it: as the cheapest adversarial training, and the baseline of every fast method. At large ε or over many
epochs watch for catastrophic overfitting, and try nfgsm.py or gradalign.py.
"""

from __future__ import annotations

from typing import Literal

import bilevel_at as ba
from bilevel_at.modes import Mode
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.solvers import ZeroIG

Draw = Literal["cube", "set"]


def uniform(epsilon: float, draw: Draw) -> ba.Uniform:
    """A uniform start: in the cube [−ε, ε]^d, then clipped to the input range, or in the set C."""
    return ba.Uniform(epsilon if draw == "cube" else None)


def problem(
    epsilon: float = 8 / 255,
    step: float | None = None,
    draw: Draw = "cube",
    label_smoothing: float = 0.0,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """One sign step from a uniform draw in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        step: length of the sign step, 1.25 ε if not given.
        draw: a uniform start is drawn in the cube [−ε, ε]^d and then clipped to the input range, or in the set C.
        label_smoothing: share of the label that is spread over all classes, for both players.
        mode: train or eval batch statistics in attack passes.
    """
    step = 1.25 * epsilon if step is None else step
    loss = ba.CrossEntropy(label_smoothing)
    lower = ba.Linearized(ba.minus(loss), ba.LinfBall(epsilon), uniform(epsilon, draw), "sign", step, mode)
    return ba.BilevelProblem(ba.UpperProblem(loss), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    return {"digits": DIGITS, "cifar10": CIFAR}
