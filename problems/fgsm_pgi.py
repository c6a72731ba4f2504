"""FGSM-PGI (Jia et al., 2022): FGSM from what is remembered of the attack before, tied to the prediction there.

    Γ = ∇_δ ℓ(θ, z),      δ* = P_C(z + step · sign Γ)
    min_θ  mean_i ℓ(θ, δ*_i) + coefficient/K · ‖f_θ(x_i + δ*_i) − f_θ(x_i + z_i)‖²

with ℓ the cross-entropy to targets that have 0.6 on the label and the rest on the K − 1 other classes. Gradients in θ
go through both predictions; the pass at z is shared by the attack and the second term. What is remembered as the next
z:

    MEP    P_C(z + step · sign m),  m ← Γ/‖Γ‖₁ + μ m, per example       (‖Γ‖₁ is of the whole batch: one number)
    EP     δ*, per example
    BP     δ*, by position in the batch, for the next batch

Examples begin at a random corner of ±min(step, ε), which is not clipped to the input range. What is remembered does not
follow crop and flip: it is added to whatever crop the image has now, and may leave the input range a little there.

Published settings (the authors' code, which has MEP alone; EP and BP are written here as the paper's names say): step
ε, μ = 0.3, coefficient 10, memory begun anew every 40 epochs (10 on CIFAR-100 and Tiny-ImageNet), train mode
throughout; ResNet-18, 110 epochs of batch 128, rate 0.1 divided by 10 after 100 and 105, weight decay 5e-4. ATAS' paper
(Table I, 30 epochs) reports clean 67.27 %, PGD-50 45.98 %, AutoAttack 39.22 %, and 16.01 % at 16/255; the FastAT
benchmark (100 epochs, averaged weights, targets smoothed over all classes, starts clipped) 79.72 %, 55.82 %, 49.89 ±
0.08 %.

When to use it: for one-step training over many epochs, where memory for two perturbations of each example is at hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.batch import per_sample
from bilevel_at.errors import at_least, one_of
from bilevel_at.modes import Mode
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.steps import step_policy

Variant = Literal["mep", "ep", "bp"]


class SignOfNoise(ba.Start):
    """z = P_C(±step), every sign a fair coin.

    Args:
        step: a number or a schedule.
    """

    def __init__(self, step: float) -> None:
        self.corner = ba.Corner(step, clip=False)

    def fresh(self, constraint: ba.Constraint, base: Tensor, generator: torch.Generator | None) -> Tensor:
        return constraint.project(self.corner.fresh(constraint, base, generator), base)


class Prior(ba.Remembered):
    """δ* as it was, without crop, flip and projection; begun anew in epochs 0, n, 2n, … (EP and BP).

    Args:
        by: "example" or "position".
        start: where it begins.
        reset_every: n, 0 for never.
    """

    def __init__(self, by: Literal["example", "position"], start: ba.Start, reset_every: int) -> None:
        super().__init__(start, by=by, view=False, clip=False, reset_every=reset_every)

    def resets(self, epoch: int, epochs: int) -> bool:
        return self.reset_every > 0 and epoch % self.reset_every == 0


class MomentumPrior(Prior):
    """A step along the momentum of gradients, per example (MEP).

    Args:
        constraint: C(x).
        step: the length of the step.
        decay: μ, at least 0.
        start: where it begins.
        reset_every: n, 0 for never.
    """

    def __init__(self, constraint: ba.Constraint, step: float, decay: float, start: ba.Start, reset_every: int) -> None:
        super().__init__("example", start, reset_every)
        self.constraint, self.step, self.decay = constraint, step_policy(step), at_least("decay", decay)
        self.momentum = ba.SampleMemory()

    def observe(self, step: ba.Hypergradient) -> None:
        batch, anchor, descent = step.solution.batch, step.solution.anchor, step.solution.attack_gradient
        assert descent is not None  # a linearised attacker always has it
        scale = shares.total(descent.abs().sum()).clamp(min=torch.finfo(descent.dtype).tiny)
        momentum = -descent / scale + self.decay * self.momentum.read(batch, torch.zeros_like(descent))
        size = per_sample(self.step.size(batch, descent), anchor)
        self.memory.write(batch, self.constraint.project(anchor + size * momentum.sign(), batch.x))
        self.momentum.write(batch, momentum)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        if self.resets(epoch, epochs):
            self.memory.clear()
            self.momentum.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.memory.state_dict(), "momentum": self.momentum.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["start"])
        self.momentum.load_state_dict(state["momentum"])


class Tied(ba.UpperProblem):
    """f = ℓ(θ, δ) + coefficient/K · ‖f_θ(x + δ) − f_θ(x + z)‖², ``[B]``; the attack has made the pass at z.

    Args:
        loss: ℓ.
        coefficient: at least 0.
    """

    def __init__(self, loss: ba.Loss, coefficient: float) -> None:
        self.criterion: ba.Loss = loss
        self.coefficient = at_least("coefficient", coefficient)

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        start: Tensor = solution.output
        moved = ba.logits(model, batch, solution.delta)
        return self.criterion.value(moved, batch) + self.coefficient * (moved - start).square().mean(1)


def problem(
    epsilon: float = 8 / 255,
    variant: Variant = "mep",
    decay: float = 0.3,
    coefficient: float = 10.0,
    step: float | None = None,
    reset_every: int = 40,
    label_smoothing: float = 0.4,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """One sign step from what is remembered, in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        variant: what is remembered: a step along the momentum of gradients, the example's perturbation, or the batch's.
        decay: μ, how much of the momentum is kept; of MEP.
        coefficient: weight of the difference between the two predictions.
        step: length of the sign step, ε if not given.
        reset_every: n; memory begins anew in epochs 0, n, 2n, …; 0 for never.
        label_smoothing: share of the other classes in the targets of the attack's and the training loss.
        mode: train or eval batch statistics in attack passes.
    """
    one_of("variant", variant, ("mep", "ep", "bp"))
    loss, ball = ba.CrossEntropy(label_smoothing, over="others"), ba.LinfBall(epsilon)
    step = epsilon if step is None else step
    start = SignOfNoise(step)
    anchor: Prior
    if variant == "mep":
        anchor = MomentumPrior(ball, step, decay, start, reset_every)
    else:
        anchor = Prior("example" if variant == "ep" else "position", start, reset_every)
    lower = ba.Linearized(ba.minus(loss), ball, anchor, "sign", step, mode, keep_output=True)
    return ba.BilevelProblem(Tied(loss, coefficient), lower)


def recipe() -> dict[str, Recipe]:
    cifar = replace(CIFAR, model="resnet18", epochs=110, lr=0.1, schedule="multistep", milestones=(100, 105))
    often = cifar.playing(reset_every=10)
    return {"digits": DIGITS, "cifar10": cifar, "cifar100": often, "tiny_imagenet": often}
