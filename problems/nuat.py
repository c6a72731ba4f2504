"""NuAT (Sriramanan et al., 2021): training on clean images, with the nuclear norm of what an attack changes in a batch.

    D(δ) = f(x) − f(x + δ), a matrix [B, K] of logits;   ‖D‖_* the sum of its singular values
    min_θ  mean_i ℓ_CE(f(x_i)) + λ_e ‖D(δ*)‖_* / 64
    δ* = P_C(z + ε · sign ∇_δ [Σ_i ℓ_CE(x_i + z_i) + λ_e ‖r − f(x + z)‖_* · [batch b of the epoch is odd]])

r = f(x) in train mode, a constant; the attack itself is in eval mode; z is a random corner of the cube of radius ε/2,
clipped to the input range. The loss couples the examples of a batch: it is one number, so a run refuses
``--accumulate``.

Published settings (the authors' code): λ_e rises linearly from 0 to 4.5 in 90 of 100 epochs (so the first epoch trains
on clean images alone); batch 64, and 64 is the divisor in a smaller last batch too (``--divisor``); rate 0 → 0.1 in 40
epochs and down to 0.02, then divided by 10 after epochs 85 and 90, here 0 → 0.1 → 0 linearly. The README has the
nuclear norm in the attack of every batch, the code in every second (``--no-alternate``: in every one); the paper has no
divisor. On the digits 30 epochs, of which λ_e rises in 27.

Figures (ResNet-18, 8/255): 81.01 clean, AutoAttack 49.24 in the authors' table; 76.68 and 45.96 in ATAS' Table I (30
epochs), and 0.08 under AutoAttack at 16/255, where the authors' code clips at 8/255 unless it is edited (whether
it was is not known); 80.98 and 50.10 in the FastAT benchmark, with label smoothing 0.4.

When to use it: for one-step training that holds the logits of a whole batch together. Batches cannot be accumulated;
gat.py has a loss for each example.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.errors import at_least, positive
from bilevel_at.losses import check_classes
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.solvers import ZeroIG


def nuclear_norm(clean: Tensor, moved: Tensor) -> Tensor:
    """‖clean − moved‖_* of two matrices of logits, one number, in float32 at least; of the whole batch."""
    change = shares.whole(clean - moved)
    norm: Tensor = torch.linalg.matrix_norm(change if change.dtype == torch.float64 else change.float(), "nuc")
    return norm


class Alternating(ba.CrossEntropy):
    """What the attacker maximises: ℓ, and in every second batch of an epoch weight · gap(r, f(x + δ)) besides.

    ``[B]``, or one number where the gap is one.

    Args:
        weight: of the gap, by epoch.
        alternate: whether the gap is left out in batches 0, 2, 4, … of an epoch.
        label_smoothing: of ℓ.
    """

    def __init__(self, weight: ba.Schedule, alternate: bool = True, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        self.weight, self.alternate, self.counter = weight, alternate, ba.Counter()

    def gap(self, reference: Tensor, output: Tensor) -> Tensor:
        """How far the logits are from those at x."""
        return nuclear_norm(reference, output)

    def prepare(self, model: nn.Module, batch: ba.Batch, generator: torch.Generator | None) -> ba.Batch:
        """The batch with ``reference`` ``[B, K]``, r = f(x) in train mode, without a graph."""
        with ba.attack_mode(model, "train"), torch.no_grad():
            return batch.replace(reference=ba.logits(model, batch, torch.zeros_like(batch.x)))

    def value(self, output: Tensor, batch: ba.Batch) -> Tensor:
        losses = super().value(output, batch)
        if self.alternate and self.counter.count % 2 == 0:
            return losses
        gap = self.gap(batch.more["reference"], output)
        if gap.ndim == 0:
            return losses.sum() + self.weight.value * shares.part(gap)
        return losses + self.weight.value * gap


class Nuclear(ba.UpperProblem):
    """f = mean_i ℓ(f(x_i)) + weight · ‖f(x) − f(x + δ)‖_* / divisor, one number; x + δ passes first.

    Args:
        weight: λ_e, by epoch.
        divisor: the nominal size of a batch.
        criterion: ℓ.
    """

    def __init__(self, weight: ba.Schedule, divisor: float, criterion: ba.CrossEntropy = ba.cross_entropy) -> None:
        self.weight, self.divisor = weight, positive("divisor", divisor)
        self.criterion: ba.CrossEntropy = criterion

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        moved = ba.logits(model, batch, solution.delta)
        clean = ba.logits(model, batch, torch.zeros_like(batch.x))
        check_classes(clean, batch)
        change = self.weight.value * nuclear_norm(clean, moved) / self.divisor
        return self.criterion.value(clean, batch).mean() + change


def problem(
    epsilon: float = 8 / 255,
    weight: float = 4.5,
    rise: float = 0.9,
    divisor: float = 64.0,
    alternate: bool = True,
    label_smoothing: float = 0.0,
) -> ba.BilevelProblem:
    """One sign step of ε from a corner of the cube of radius ε/2.

    Args:
        epsilon: radius ε of the ball.
        weight: of the nuclear norm, at its greatest.
        rise: the share of the epochs in which the weight rises from 0, linearly; 0 for none.
        divisor: of the nuclear norm in the training loss, the batch size.
        alternate: leave the nuclear norm out of the attack in every second batch.
        label_smoothing: the share of a label that is spread over all classes, in the attack and in training.
    """
    at_least("weight", weight)
    if not 0 <= at_least("rise", rise) <= 1:
        raise ba.InputError(f"rise is {rise:g}; it must be a share of the epochs, from 0 to 1")
    coefficient = ba.Schedule(lambda epoch, epochs: weight * min(epoch / (rise * epochs), 1.0) if rise else weight)
    attack_loss = ba.minus(Alternating(coefficient, alternate, label_smoothing))
    lower = ba.Linearized(attack_loss, ba.LinfBall(epsilon), ba.Corner(epsilon / 2), "sign", epsilon, "eval")
    return ba.BilevelProblem(Nuclear(coefficient, divisor, ba.CrossEntropy(label_smoothing)), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    return {"digits": DIGITS, "cifar10": replace(CIFAR, model="resnet18", epochs=100, batch_size=64, lr=0.1)}
