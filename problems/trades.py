"""TRADES (Zhang et al., 2019): natural loss, plus the divergence that an attacker can cause.

    min_θ  mean_i ℓ_CE(f_θ(x_i)) + weight · KL(f_θ(x_i) ‖ f_θ(x_i + δ*_i))                                  (equation 5)
    δ* ≈ argmax_{δ ∈ C} KL(f_θ(x) ‖ f_θ(x + δ)),   K sign steps from N(0, 0.001² I)                        (Algorithm 1)

weight is the paper's 1/λ. Gradients in θ go through both arguments of the divergence. Attack passes see f_θ(x) as it
was when the attack began, and compute it once.

Published settings (section 5 and the authors' code): ε = 0.031, step 0.007, K = 10, weight 6, attacks in eval mode,
from a start that is not projected onto C (``--clip-start``: is); WideResNet-34-10, 76 epochs of batch 128, rate 0.1
divided by 10 from epoch 75 on, weight decay 2e-4. Here ε = 8/255 and step 2/255, which are those numbers in their
usual units. On the digits K = 7 and step ε/4, as for min-max training.

When to use it: to weigh clean against robust accuracy by one number, where K attack steps an update can be paid for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.errors import at_least
from bilevel_at.modes import Mode
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.solvers import ZeroIG


class Tradeoff(ba.UpperProblem):
    """f = ℓ_CE(f_θ(x)) + weight · KL(f_θ(x) ‖ f_θ(x + δ)), ``[B]``.

    Args:
        weight: at least 0.
        criterion: ℓ_CE.
    """

    def __init__(self, weight: float, criterion: ba.CrossEntropy = ba.cross_entropy) -> None:
        self.weight = at_least("weight", weight)
        self.criterion: ba.CrossEntropy = criterion

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        clean = ba.logits(model, batch, torch.zeros_like(batch.x))
        losses = self.criterion.value(clean, batch)
        if self.weight == 0:
            return losses
        log_clean, log_moved = F.log_softmax(clean, 1), F.log_softmax(ba.logits(model, batch, solution.delta), 1)
        return losses + self.weight * F.kl_div(log_moved, log_clean, reduction="none", log_target=True).sum(1)


def problem(
    epsilon: float = 8 / 255,
    weight: float = 6.0,
    steps: int = 10,
    step: float | None = None,
    clip_start: bool = False,
    label_smoothing: float = 0.0,
    mode: Mode = "eval",
) -> ba.BilevelProblem:
    """K sign steps up the divergence in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        weight: of the divergence, 1/λ in the paper.
        steps: K, the number of sign steps.
        step: length of a sign step, ε/4 if not given.
        clip_start: project the start onto C before its first gradient.
        label_smoothing: share of the label that is spread over all classes, in the natural loss.
        mode: train or eval batch statistics in attack passes.
    """
    step = epsilon / 4 if step is None else step
    start, ball = ba.Gaussian(1e-3, clip=clip_start), ba.LinfBall(epsilon)
    lower = ba.Linearized.pgd(ba.minus(ba.kl_divergence), ball, steps, step, start, mode=mode)
    return ba.BilevelProblem(Tradeoff(weight, ba.CrossEntropy(label_smoothing)), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    cifar = replace(
        CIFAR,
        model="wide_resnet34_10",
        epochs=76,
        lr=0.1,
        weight_decay=2e-4,
        schedule="multistep",
        milestones=(74,),
    )
    return {"digits": DIGITS.playing(steps=7), "cifar10": cifar}
