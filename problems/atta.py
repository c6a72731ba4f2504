"""ATTA (Zheng et al., 2020): sign steps of constant length from remembered perturbations.

    δ*_i = P_C(z_i + step · sign ∇_δ ℓ(θ, z_i)),    z_i = δ*_i of the last epoch

ATAS without its adaptive step (ATAS paper, section IV). Perturbations live on the padded canvas and move through the
same crop and flip as their image; on ImageNet they are kept at 32×32.

Published settings (ATAS paper, appendix B, and the authors' code): step 4/255; perturbations redrawn every 10 epochs;
attacks in eval mode; ResNet-18, 30 epochs of batch 128, rate 0.1, divided by 10 after epochs 24 and 28. ImageNet: ε =
2/255, 90 epochs, weight decay 1e-4, divided after 50 and 75. On the digits step ε/2.

When to use it: as atas.py, with one length of step to choose instead of the adaptive step's three constants.
"""

from __future__ import annotations

from dataclasses import replace

import bilevel_at as ba
from bilevel_at.modes import Mode
from bilevel_at.runs.recipe import CIFAR, DIGITS, IMAGENET, Recipe
from bilevel_at.solvers import ZeroIG


def problem(
    epsilon: float = 8 / 255,
    step: float = 4 / 255,
    reset_every: int = 10,
    size: int | None = None,
    label_smoothing: float = 0.0,
    mode: Mode = "eval",
) -> ba.BilevelProblem:
    """Sign steps of constant length from remembered perturbations in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        step: length of the sign step.
        reset_every: epochs after which perturbations are drawn anew; 0 for never.
        size: keep perturbations resized to size × size; at full size if not given.
        label_smoothing: share of the label that is spread over all classes, for both players.
        mode: train or eval batch statistics in attack passes.
    """
    anchor = ba.Remembered(reset_every=reset_every, size=size)
    loss = ba.CrossEntropy(label_smoothing)
    lower = ba.Linearized(ba.minus(loss), ba.LinfBall(epsilon), anchor, "sign", step, mode)
    return ba.BilevelProblem(ba.UpperProblem(loss), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    cifar = replace(CIFAR, model="resnet18", epochs=30, lr=0.1, schedule="multistep", milestones=(24, 28))
    imagenet = replace(
        IMAGENET,
        model="imagenet_resnet18",
        epochs=90,
        batch_size=128,
        lr=0.1,
        schedule="multistep",
        milestones=(50, 75),
    )
    return {
        "digits": DIGITS.playing(step=0.1),
        "cifar10": cifar,
        "imagenet": imagenet.playing(size=32),
    }
