"""GAT (Sriramanan et al., 2020): training on clean images, guided by how far an attack moves each prediction.

    min_θ  mean_i ℓ_CE(f(x_i)) + λ_e ‖p(x_i) − p(x_i + δ*_i)‖²                                   p = softmax f
    δ* = P_C(z + ε · sign ∇_δ [ℓ_CE(x + z) + λ_e ‖r − p(x + z)‖² · [batch b of the epoch is odd]])

r = p(x) in train mode, a constant; the attack itself is in eval mode; z is a random corner of the cube of radius ε/2,
clipped to the input range: NuAT's attacker (nuat.py) with a distance for each example, so the loss is per sample.

Published settings (the authors' code): λ_e is 10, and 40 from epoch 86 of 100 on; batch 64; rate 0.1 divided by 10
after epochs 70 and 85; weight decay 5e-4. The code's attack alternates by batch (``--no-alternate``: does not).

Figures (ResNet-18, 8/255): 80.49 clean, AutoAttack 47.30 in the authors' table; 85.10, 49.15 in the FastAT benchmark,
with label smoothing 0.4.

When to use it: as nuat.py, where the loss must be one of each example: with ``--accumulate``, or with small batches.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.errors import at_least
from bilevel_at.losses import check_classes
from bilevel_at.problems.nuat import Alternating
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.solvers import ZeroIG


def squared_distance(clean: Tensor, moved: Tensor) -> Tensor:
    """‖softmax(clean) − softmax(moved)‖², ``[B]``."""
    return (F.softmax(clean, 1) - F.softmax(moved, 1)).square().sum(1)


class Guiding(Alternating):
    """ℓ, and in every second batch weight · ‖p(x) − p(x + δ)‖², ``[B]``."""

    def gap(self, reference: Tensor, output: Tensor) -> Tensor:
        return squared_distance(reference, output)


class Guided(ba.UpperProblem):
    """f = ℓ(f(x)) + weight · ‖p(x) − p(x + δ)‖², ``[B]``; x + δ passes first. weight: λ_e, by epoch."""

    def __init__(self, weight: ba.Schedule, criterion: ba.CrossEntropy = ba.cross_entropy) -> None:
        self.weight = weight
        self.criterion: ba.CrossEntropy = criterion

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        moved = ba.logits(model, batch, solution.delta)
        clean = ba.logits(model, batch, torch.zeros_like(batch.x))
        check_classes(clean, batch)
        return self.criterion.value(clean, batch) + self.weight.value * squared_distance(clean, moved)


def problem(
    epsilon: float = 8 / 255,
    weight: float = 10.0,
    late_factor: float = 4.0,
    late: float = 0.86,
    alternate: bool = True,
    label_smoothing: float = 0.0,
) -> ba.BilevelProblem:
    """One sign step of ε from a corner of the cube of radius ε/2.

    Args:
        epsilon: radius ε of the ball.
        weight: of the squared distance.
        late_factor: what the weight is multiplied by in the last epochs.
        late: the share of the epochs that come before these.
        alternate: leave the distance out of the attack in every second batch.
        label_smoothing: the share of a label that is spread over all classes, in the attack and in training.
    """
    at_least("weight", weight)
    at_least("late_factor", late_factor)
    if not 0 <= at_least("late", late) <= 1:
        raise ba.InputError(f"late is {late:g}; it must be a share of the epochs, from 0 to 1")
    coefficient = ba.Schedule(lambda epoch, epochs: weight * (late_factor if epoch >= late * epochs else 1.0))
    attack_loss = ba.minus(Guiding(coefficient, alternate, label_smoothing))
    lower = ba.Linearized(attack_loss, ba.LinfBall(epsilon), ba.Corner(epsilon / 2), "sign", epsilon, "eval")
    return ba.BilevelProblem(Guided(coefficient, ba.CrossEntropy(label_smoothing)), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    cifar = replace(
        CIFAR,
        model="resnet18",
        epochs=100,
        batch_size=64,
        lr=0.1,
        peak_momentum=None,
        schedule="multistep",
        milestones=(70, 85),
    )
    return {"digits": DIGITS, "cifar10": cifar}
