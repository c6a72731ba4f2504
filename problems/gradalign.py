"""GradAlign (Andriushchenko and Flammarion, 2020): FGSM training with aligned input gradients.

    min_θ  mean_i ℓ_CE(θ, δ*_i) + coefficient · Ω(θ)
    Ω(θ) = mean_i 1 − cos(∇_x ℓ(x_i), ∇_x ℓ(x_i + η_i)),   η ~ U[−ε, ε]^d                                   (equation 7)
    δ* = P_C(z + step · sign ∇_x ℓ(x + z)),   z = 0

A regulariser of the upper level; the lower level is FGSM's, whose gradient at 0 the regulariser takes over. As
published, that gradient is then a constant of Ω and θ moves only the other one; examples where either gradient is zero
are left out of the mean. ``--steps 2`` is GradAlign on PGD-2, for which the authors' code moves both.

Published settings (the authors' code and section 5): step 1.25 ε, which is ε after projection; coefficient 0.036,
0.063, 0.112, 0.200, 0.356, 0.632, 1.124, 2.000 at ε = 2, 4, …, 16 (/255); 30 epochs, peak rate 0.3, model in train
mode throughout; η is not clipped to the input range. PGD-2: zero start, step ε/2. Here 20 epochs and 0.2, as the
Fast-BAT paper trains it (section 5.1). On the digits, where ε is far beyond that list, coefficient 0.2 (at 2 the
network learns nothing).

When to use it: against catastrophic overfitting at large ε, for a double backward pass in every step. nfgsm.py is the
cheaper thing to try first.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.errors import at_least
from bilevel_at.modes import Mode
from bilevel_at.policy import Number, checked, last_number
from bilevel_at.problems.fastat import Draw, uniform
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.solvers import ZeroIG


class GradAlign(ba.UpperProblem):
    """f_i = ℓ_CE(θ, δ_i) + coefficient · (B / |S|) · [i ∈ S] · (1 − cos(∇ℓ(θ, 0), ∇ℓ(θ, η_i))), ``[B]``.

    S: the examples of the batch whose two gradients are not zero, so that mean_i f_i is the mean over the batch plus
    coefficient times the mean over S.

    Args:
        attack_loss: ℓ up to its sign; the lower level's.
        radius: ε of the draw of η, which is not clipped to the input range.
        coefficient: at least 0.
        detach: ∇ℓ(θ, 0) is a constant, as published; the result is then not the gradient of f, and ``hypergradcheck``
            says so.
        mode: in which both gradients see the model; the lower level's.
        starts_at_zero: the lower level is linearised at z = 0, so that its gradient there is ∇ℓ(θ, 0).
        criterion: ℓ_CE.
    """

    def __init__(
        self,
        attack_loss: ba.Loss,
        radius: Number,
        coefficient: float,
        detach: bool = True,
        mode: Mode = "train",
        starts_at_zero: bool = False,
        criterion: ba.Loss = ba.cross_entropy,
    ) -> None:
        self.criterion: ba.Loss = criterion
        self.attack_loss = attack_loss
        self.radius, self.coefficient = checked(at_least, "radius", radius), at_least("coefficient", coefficient)
        self.detach, self.mode, self.starts_at_zero = detach, mode, starts_at_zero

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        """f ``[B]``; η is drawn from ``generator``."""
        losses = self.criterion(model, batch, solution.delta)
        if self.coefficient == 0:
            return losses
        shared = self.detach and self.starts_at_zero and solution.drawn
        clean = solution.attack_gradient if shared else None
        if clean is None:
            clean = self._gradient(model, batch, torch.zeros_like(batch.x), create_graph=not self.detach)
        eta = ba.LinfBall(self.radius, bounds=None).sample(batch.x, generator)
        moved = self._gradient(model, batch, eta, create_graph=True)
        defined = (clean.flatten(1) != 0).any(1) & (moved.flatten(1) != 0).any(1)
        # Where the cosine is undefined its own gradient is NaN, which no mask removes afterwards.
        clean, moved = (torch.where(defined[:, None], g.flatten(1), 1.0) for g in (clean, moved))
        distance = (1 - nn.functional.cosine_similarity(clean, moved)) * defined
        return losses + self.coefficient * distance * shares.size(batch) / shares.total(defined.sum()).clamp(min=1)

    def _gradient(self, model: nn.Module, batch: ba.Batch, delta: Tensor, create_graph: bool) -> Tensor:
        with ba.attack_mode(model, self.mode):
            return ba.input_gradient(self.attack_loss, model, batch, delta, create_graph)[0]


def published_coefficient(epsilon: Number) -> float:
    """The authors' values for ε = 2, 4, …, 16 (/255), interpolated geometrically, and 2 above."""
    values = (0.036, 0.063, 0.112, 0.200, 0.356, 0.632, 1.124, 2.000)
    place = min(last_number(epsilon) * 255 / 2 - 1, len(values) - 1.0)
    below = min(max(int(place), 0), len(values) - 2)
    return math.exp(math.log(values[below]) + (place - below) * math.log(values[below + 1] / values[below]))


def problem(
    epsilon: float = 8 / 255,
    coefficient: float | None = None,
    steps: int = 1,
    start: Literal["zero", "uniform"] = "zero",
    step: float | None = None,
    detach: bool | None = None,
    draw: Draw = "cube",
    label_smoothing: float = 0.0,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """FGSM, or PGD, with the alignment regulariser, in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        coefficient: weight of the regulariser; the published one for ε if not given.
        steps: sign steps of the attack.
        start: where they begin.
        step: length of a sign step; 1.25 ε for one step and ε/2 for more if not given.
        detach: take the gradient at x as a constant of the regulariser; if not given, for one step only, as published.
        draw: a uniform start is drawn in the cube [−ε, ε]^d and then clipped to the input range, or in the set C.
        label_smoothing: share of the label that is spread over all classes, for both players.
        mode: train or eval batch statistics in attack passes.
    """
    ball, loss = ba.LinfBall(epsilon), ba.CrossEntropy(label_smoothing)
    attack_loss = ba.minus(loss)
    if step is None:
        step = 1.25 * epsilon if steps == 1 else epsilon / 2
    begin = uniform(epsilon, draw) if start == "uniform" else start
    lower = ba.Linearized.pgd(attack_loss, ball, steps, step, begin, mode=mode)
    weight = published_coefficient(epsilon) if coefficient is None else coefficient
    constant = steps == 1 if detach is None else detach
    at_zero = steps == 1 and start == "zero"
    return ba.BilevelProblem(GradAlign(attack_loss, epsilon, weight, constant, mode, at_zero, loss), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    return {"digits": DIGITS.playing(coefficient=0.2), "cifar10": CIFAR}
