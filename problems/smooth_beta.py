"""Smooth BETA adversarial training (Robey et al., 2023): every class's perturbation, weighted by its margin.

    η_j ∈ argmax_{η ∈ C(x)} M_j(θ, x + η),   M_j = f_j − f_y,   for every class j ≠ y        (Algorithm 3)
    min_θ  mean_i Σ_{j≠y} w_j ℓ_CE(θ, η_j),   w = softmax_j(μ M_j(θ, x + η_j))               (equation 34)

with gradients in θ through the weights. The lower level is BETA's (beta.py), and so are the published settings; the
paper gives none for μ.

When to use it: as beta.py, where every class's perturbation is to count; the defender's pass, too, is then over all
classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.errors import positive
from bilevel_at.losses import check_classes
from bilevel_at.modes import Mode
from bilevel_at.problems import beta
from bilevel_at.problems.beta import solver  # noqa: F401  (the same choice)
from bilevel_at.runs.recipe import Recipe
from bilevel_at.targeted import other_classes


class SmoothMargin(ba.UpperProblem):
    """f = Σ_{j≠y} softmax_j(μ M_j(x + η_j)) ℓ_CE(x + η_j), ``[B]`` (Algorithm 3, equation 34).

    ``delta`` has a row per example and class, as :class:`~bilevel_at.Targeted` with ``keep="all"`` returns them.
    """

    def __init__(self, temperature: float = 1.0, criterion: ba.CrossEntropy = ba.cross_entropy) -> None:
        self.temperature = positive("temperature", temperature)
        self.criterion: ba.CrossEntropy = criterion

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        """f ``[B]`` from ``delta`` ``[B · (K − 1), ...]``; gradients go through the weights."""
        delta = solution.delta
        each = len(delta) // len(batch)
        wide = batch.repeat(each)
        out = ba.logits(model, wide, delta)
        y = check_classes(out, wide)
        targets = other_classes(y[::each], each + 1).flatten()
        own = out.gather(1, y[:, None]).squeeze(1)
        margin = out.gather(1, targets[:, None]).squeeze(1) - own
        weights = torch.softmax(self.temperature * margin.reshape(-1, each), 1)
        losses = self.criterion.value(out, wide).reshape(-1, each)
        return (weights * losses).sum(1)


def problem(
    epsilon: float = 8 / 255,
    steps: int = 10,
    step: float = 2 / 255,
    optim: str = "RMSprop",
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """The negative-margin attacker in an ℓ∞ ball, all classes kept.

    Args:
        epsilon: radius ε of the ball.
        steps: optimiser steps of the attack.
        step: their learning rate.
        optim: the attack's optimiser, a class of torch.optim.
        temperature: μ, of the softmax over margins.
        label_smoothing: share of the label that is spread over all classes, in the training loss.
        mode: train or eval batch statistics in attack passes.
    """
    lower = beta.attacker(epsilon, steps, step, optim, mode, keep="all")
    return ba.BilevelProblem(SmoothMargin(temperature, ba.CrossEntropy(label_smoothing)), lower)


def recipe() -> dict[str, Recipe]:
    return beta.recipe()
