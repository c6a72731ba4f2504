"""MART (Wang et al., 2020): boosted cross-entropy, and a divergence weighted by how unsure the network is of x.

    f = BCE(p(x + δ*), y) + weight · KL(p(x) ‖ p(x + δ*)) · (1 − p_y(x))
    BCE(p, y) = −log p_y − log(1 − max_{k≠y} p_k)
    δ* ≈ argmax_{δ ∈ C} ℓ_CE(θ, δ),   K sign steps from N(0, 0.001² I)

with p = softmax(f_θ) (section 3). Gradients in θ go through every p. The attack is min-max training's, from a start
that is projected onto C.

Published settings (section 4 and the authors' code): ε = 0.031, step 0.007, K = 10, weight 5, attacks in eval mode;
ResNet-18, 120 epochs of batch 128, rate 0.01 divided by 10 from epochs 75, 90 and 100 on, weight decay 3.5e-3. Here ε =
8/255 and step 2/255, which are those numbers in their usual units. On the digits K = 7 and step ε/4, as for min-max
training.
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


def boosted_cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """−log p_y − log(1 − max_{k≠y} p_k) from logits ``[B, K]``, ``[B]``.

    1 − p_k is Σ_{j≠k} p_j, whose logarithm is a logsumexp: finite where 1 − p_k rounds to 0.
    """
    log_p = F.log_softmax(out, 1)
    label = F.one_hot(y, out.shape[1]).bool()
    rival = out.masked_fill(label, -torch.inf).argmax(1, keepdim=True)
    others = log_p.masked_fill(torch.zeros_like(label).scatter(1, rival, True), -torch.inf)
    return -log_p.gather(1, y[:, None]).squeeze(1) - others.logsumexp(1)


class Misclassification(ba.UpperProblem):
    """f = BCE(p(x + δ), y) + weight · KL(p(x) ‖ p(x + δ)) · (1 − p_y(x)), ``[B]``. weight: at least 0."""

    def __init__(self, weight: float) -> None:
        self.weight = at_least("weight", weight)

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        moved = ba.logits(model, batch, solution.delta)
        losses = boosted_cross_entropy(moved, batch.y)
        if self.weight == 0:
            return losses
        log_clean = F.log_softmax(ba.logits(model, batch, torch.zeros_like(batch.x)), 1)
        divergence = F.kl_div(F.log_softmax(moved, 1), log_clean, reduction="none", log_target=True).sum(1)
        unsure = 1 - log_clean.gather(1, batch.y[:, None]).squeeze(1).exp()
        return losses + self.weight * divergence * unsure


def problem(
    epsilon: float = 8 / 255,
    weight: float = 5.0,
    steps: int = 10,
    step: float | None = None,
    mode: Mode = "eval",
) -> ba.BilevelProblem:
    """K sign steps up the cross-entropy in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        weight: of the divergence, λ in the paper.
        steps: K, the number of sign steps.
        step: length of a sign step, ε/4 if not given.
        mode: train or eval batch statistics in attack passes.
    """
    step = epsilon / 4 if step is None else step
    start, ball = ba.Gaussian(1e-3), ba.LinfBall(epsilon)
    lower = ba.Linearized.pgd(ba.minus(ba.cross_entropy), ball, steps, step, start, mode=mode)
    return ba.BilevelProblem(Misclassification(weight), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    cifar = replace(
        CIFAR,
        model="resnet18",
        epochs=120,
        lr=0.01,
        weight_decay=3.5e-3,
        schedule="multistep",
        milestones=(74, 89, 99),
    )
    return {"digits": DIGITS.playing(steps=7), "cifar10": cifar}
