"""TDAT (Tong et al., 2024): FGSM from the perturbations of the batch before, with targets that soften by epoch.

    z = δ* of the batch before, by position;      δ* = P_C(z + ε · sign ∇_δ ℓ_S(θ, z))
    min_θ  mean_i ℓ_T(θ, δ*_i) + weight · ‖f_θ(x_i + z_i) − f_θ(x_i + δ*_i)‖² · tanh(1.0000001 − p_y(x_i + z_i))
    γ_e = max(0.15, 0.6 tan(1 − e/E)) in epoch e of E, from 0

The attack's targets S have γ_e on the label and the rest on the other classes; those of training, T, γ_e on the label
and 1 − γ_e shared by all classes, as PyTorch's ``label_smoothing`` does. Gradients in θ go through both predictions and
through p = softmax(f_θ); the pass at z is shared by the attack and the second term. Positions begin at a random corner
of the ball. z comes from another image and is not clipped to this one's range.

Published settings (the authors' code): weight 0.65, train mode throughout; ResNet-18, 110 epochs of batch 128, rate 0.1
divided by 10 after 100 and 105, weight decay 5e-4. The code computes the momentum 0.75 z + 0.25 δ* of the paper and
then remembers δ* itself (``--batch-momentum 0.75``: the momentum). It leaves out the last batch of an epoch where that
is smaller, and this library does not. The authors' log (ResNet-18, last epoch, with weight 0.6) has clean 82.25 % and
PGD-10 56.85 %. ``--label-smoothing a`` is 1 − γ, the same in every epoch.

When to use it: to train on targets that soften over a long run. In the 30 epochs on the digits it does not reach
Fast-AT.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.errors import at_least, finite
from bilevel_at.losses import check_classes
from bilevel_at.modes import Mode
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe


def label_share(epoch: int, epochs: int) -> float:
    """γ_e = max(0.15, 0.6 tan(1 − e/E))."""
    return max(0.15, 0.6 * math.tan(1 - epoch / epochs))


class OfTheBatchBefore(ba.Remembered):
    """share · z + (1 − share) · δ*, by position in the batch; it begins at a random corner.

    Args:
        share: in [0, 1].
    """

    def __init__(self, share: float) -> None:
        if not 0 <= finite("batch_momentum", share) <= 1:
            raise ba.InputError(f"batch_momentum is {share:g}; it must be from 0 to 1")
        super().__init__("corner", by="position", view=False, clip=False)
        self.share = share

    def to_remember(self, step: ba.Hypergradient) -> Tensor:
        return torch.lerp(step.solution.delta, step.solution.anchor, self.share)


class Relation(ba.UpperProblem):
    """f = ℓ(θ, δ) + weight · ‖f_θ(x + z) − f_θ(x + δ)‖² · tanh(1.0000001 − p_y(x + z)), ``[B]``.

    Args:
        loss: ℓ.
        weight: at least 0.
    """

    def __init__(self, loss: ba.Loss, weight: float) -> None:
        self.criterion: ba.Loss = loss
        self.weight = at_least("weight", weight)

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        start: Tensor = solution.output
        moved = ba.logits(model, batch, solution.delta)
        label = check_classes(moved, batch)[:, None]
        unsure = torch.tanh(1.0000001 - F.softmax(start, 1).gather(1, label).squeeze(1))
        return self.criterion.value(moved, batch) + self.weight * (start - moved).square().sum(1) * unsure


def problem(
    epsilon: float = 8 / 255,
    weight: float = 0.65,
    batch_momentum: float = 0.0,
    step: float | None = None,
    label_smoothing: float | None = None,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """One sign step from the perturbations of the batch before, in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        weight: of the difference between the two predictions, λ in the paper.
        batch_momentum: share of the start in what is remembered, next to the perturbation.
        step: length of the sign step, ε if not given.
        label_smoothing: 1 − γ, of the attack's and the training loss; as published, by epoch, if not given.
        mode: train or eval batch statistics in attack passes.
    """
    soft = ba.Schedule(lambda epoch, epochs: 1 - label_share(epoch, epochs))
    smoothing = soft if label_smoothing is None else label_smoothing
    attack, training = ba.CrossEntropy(smoothing, over="others"), ba.CrossEntropy(smoothing)
    step = epsilon if step is None else step
    anchor, ball = OfTheBatchBefore(batch_momentum), ba.LinfBall(epsilon)
    lower = ba.Linearized(ba.minus(attack), ball, anchor, "sign", step, mode, keep_output=True)
    return ba.BilevelProblem(Relation(training, weight), lower)


def recipe() -> dict[str, Recipe]:
    cifar = replace(CIFAR, model="resnet18", epochs=110, lr=0.1, schedule="multistep", milestones=(100, 105))
    return {"digits": DIGITS, "cifar10": cifar}
