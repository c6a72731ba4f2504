"""ATAS (Huang et al., 2023): remembered perturbations, and a step of its own for every example.

    v_i ← β v_i + (1 − β) ‖∇_δ ℓ(θ, z_i)‖²            step_i = γ / (c + √v_i)                 (equations 3, 4)
    δ*_i = P_C(z_i + step_i · sign ∇_δ ℓ(θ, z_i)),    z_i = δ*_i of the last epoch             (equation 5)

Perturbations live on the padded canvas and move through the same crop and flip as their image; on ImageNet they are
kept at 32×32 (Algorithm 2).

Published settings (experiments, appendix B and the authors' code): γ/c = 16/255, β = 0.5, and c = 0.01 for gradients
of the mean over 128 samples, so c = 1.28 for the per-sample gradients used here; steps clipped to 4/255 … 14/255 at
every ε; a constant step ε in the first 5 epochs, after which v begins (in the code; in Algorithm 1 it follows the first
epochs too: ``--follow-warmup``); perturbations redrawn every 10 epochs; attacks in eval mode; training as for ATTA
(atta.py). ImageNet: ε = 2/255, c = 0.1, so 12.8 here, and steps clipped to 4/255 … 8/255. On the digits γ/c = 2ε,
c = 1.28 and steps of ε/2 … 1.75 ε, which are not tuned there.

When to use it: for a one-step attack that grows stronger over epochs, at Fast-AT's cost. It needs many epochs over the
same examples, and memory for a perturbation of each.
"""

from __future__ import annotations

import bilevel_at as ba
from bilevel_at.errors import positive
from bilevel_at.modes import Mode
from bilevel_at.problems import atta
from bilevel_at.runs.recipe import DIGITS, Recipe
from bilevel_at.solvers import ZeroIG


def problem(
    epsilon: float = 8 / 255,
    max_step: float = 16 / 255,
    c: float = 1.28,
    beta: float = 0.5,
    shortest: float = 4 / 255,
    longest: float = 14 / 255,
    warmup_epochs: int = 5,
    follow_warmup: bool = False,
    reset_every: int = 10,
    size: int | None = None,
    label_smoothing: float = 0.0,
    mode: Mode = "eval",
) -> ba.BilevelProblem:
    """Sign steps of adaptive length from remembered perturbations in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        max_step: γ/c, the step where gradients vanish.
        c: added to √v, on the scale of per-sample gradient norms.
        beta: momentum of v.
        shortest: least step.
        longest: greatest step.
        warmup_epochs: epochs with the constant step ε.
        follow_warmup: let v follow the gradients of the warm-up too (Algorithm 1), rather than begin after it.
        reset_every: epochs after which perturbations are drawn anew; 0 for never.
        size: keep perturbations resized to size × size; at full size if not given.
        label_smoothing: share of the label that is spread over all classes, for both players.
        mode: train or eval batch statistics in attack passes.
    """
    policy = ba.Adaptive(
        gamma=positive("max_step", max_step) * positive("c", c),
        c=c,
        beta=beta,
        low=shortest,
        high=longest,
        warmup_step=epsilon,
        warmup_epochs=warmup_epochs,
        follow_warmup=follow_warmup,
    )
    anchor = ba.Remembered(reset_every=reset_every, size=size)
    loss = ba.CrossEntropy(label_smoothing)
    lower = ba.Linearized(ba.minus(loss), ba.LinfBall(epsilon), anchor, "sign", policy, mode)
    return ba.BilevelProblem(ba.UpperProblem(loss), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    training = atta.recipe()
    return {
        "digits": DIGITS.playing(max_step=0.4, shortest=0.1, longest=0.35),
        "cifar10": training["cifar10"],
        "imagenet": training["imagenet"].playing(c=12.8, shortest=4 / 255, longest=8 / 255),
    }
