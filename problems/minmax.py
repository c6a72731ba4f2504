"""Min-max adversarial training: K-step PGD (Madry et al., 2018).

    min_θ  mean_i max_{δ ∈ C(x_i)} ℓ_CE(θ, x_i + δ)
    δ^{k+1} = P_C(δ^k + step · sign ∇_δ ℓ_CE(θ, x + δ^k)),   δ^0 uniform,   k = 0 … K − 1

The last step is the sign-linearised lower level (Fast-BAT paper, equations 5 and 6) around the anchor that the
K − 1 steps before it reach. Its implicit gradient is zero almost everywhere, so every solver gives Madry's update.

Published settings: ε = 8/255, step 2/255, K = 10 on CIFAR-10 (ATAS and BETA papers; Madry et al. took 7); starts drawn
and momentum moved as for Fast-AT (fastat.py). PGD-2 as the
Fast-BAT paper trains it (appendix C): ``--steps 2 --step 4/255``, that is 0.5 ε, with Fast-AT's training. On the
digits: K = 7.

When to use it: as the reference for robust accuracy, where K input gradients in every update can be paid for.
"""

from __future__ import annotations

import bilevel_at as ba
from bilevel_at.modes import Mode
from bilevel_at.problems.fastat import Draw, uniform
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.solvers import ZeroIG


def problem(
    epsilon: float = 8 / 255,
    steps: int = 10,
    step: float | None = None,
    draw: Draw = "cube",
    label_smoothing: float = 0.0,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """K-step PGD on the cross-entropy in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        steps: K, the number of sign steps.
        step: length of a sign step, ε/4 if not given.
        draw: a uniform start is drawn in the cube [−ε, ε]^d and then clipped to the input range, or in the set C.
        label_smoothing: share of the label that is spread over all classes, for both players.
        mode: train or eval batch statistics in attack passes.
    """
    step = epsilon / 4 if step is None else step
    start, ball = uniform(epsilon, draw), ba.LinfBall(epsilon)
    loss = ba.CrossEntropy(label_smoothing)
    lower = ba.Linearized.pgd(ba.minus(loss), ball, steps, step, start, mode=mode)
    return ba.BilevelProblem(ba.UpperProblem(loss), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    return {"digits": DIGITS.playing(steps=7), "cifar10": CIFAR}
