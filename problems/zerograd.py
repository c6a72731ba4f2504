"""ZeroGrad and MultiGrad (Golgooni et al., 2021): one step along the signs of the gradient that can be relied on.

    ZeroGrad:   δ* = P_C(z + step · s),     z = clip(u), u ~ U[−ε, ε]^d
                s = sign Γ(z) where |Γ(z)| is at least its q-quantile over the image, else 0
    MultiGrad:  δ* = P_C(step · s),         z_1, …, z_S as z
                s = sign n where |n| ≥ 2T − S, else 0, with n = Σ_r sign Γ(z_r)

with Γ = ∇_δ ℓ_CE(θ, ·). A coordinate with s = 0 stays at z in ZeroGrad and at 0 in MultiGrad. With T = S all signs must
agree. Quantiles are interpolated linearly.

Published settings (the authors' code): step 2ε, so that what moves goes to ±ε; q = 0.35 on CIFAR-10, 0.45 on CIFAR-100,
0.7 on SVHN; S = T = 3; the model in train mode throughout; 30 epochs of batch 128, rate 0 → 0.2 → 0 linearly at
constant momentum 0.9, weight decay 5e-4; SVHN 15 epochs with rate 0.01. The code pads by reflection before it crops,
where this library pads with zeros. MultiGrad's draws go through the network one after the other, not as one batch of SB
images, so that batch normalisation sees B images each time (the code can do either). ``--label-smoothing 0.4`` is the
setting of the FastAT benchmark, a ResNet-18 trained for 100 epochs with averaged weights: ZeroGrad clean 75.85 %,
PGD-50 51.06 %, AutoAttack 45.94 ± 2.19 %, by its own table.

When to use it: as Fast-AT without the gradient's small, unreliable signs. The share q has to be chosen for the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.errors import finite, one_of, whole_number
from bilevel_at.modes import Mode
from bilevel_at.problems.fastat import Draw, uniform
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.steps import step_policy


def row_quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of each row of ``values`` ``[B, d]``, interpolated linearly, ``[B]``.

    torch.quantile has it too, but refuses more than 16 million values, which is 112 images of 3×224×224.
    """
    ordered = values.sort(1).values
    place = q * (values.shape[1] - 1)
    below = int(place)
    above = min(below + 1, values.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below)


def large_signs(q: float) -> ba.Direction:
    """The sign of what is at least the q-quantile of its row's absolute values, and 0 elsewhere."""
    if not 0 <= finite("quantile", q) <= 1:
        raise ba.InputError(f"quantile is {q:g}; it must be from 0 to 1")

    def direction(gradient: Tensor) -> Tensor:
        size = gradient.detach().flatten(1).abs()
        small = size < row_quantile(size, q)[:, None]
        return gradient.detach().sign().masked_fill(small.reshape(gradient.shape), 0)

    return ba.Direction("large signs", direction, piecewise_constant=True)


@dataclass(eq=False)
class Agreeing(ba.Linearized):
    """MultiGrad's attacker: g(θ, δ) = ⟨−s, δ − z⟩ + λ/2 ‖δ − z‖², s where enough signs at ``draws`` points agree.

    Args:
        start: where the gradients are taken; drawn once per solve.
        draws: S, at least 1.
        agree: T, how many of the signs must agree, from S/2 to S.
    """

    start: ba.Start = ba.Uniform()  # noqa: RUF009 (stateless)
    draws: int = 3
    agree: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("draws", self.draws, 1)
        whole_number("agree", self.agree, 1)
        if not self.draws <= 2 * self.agree <= 2 * self.draws:
            raise ba.InputError(
                f"agree is {self.agree}; of {self.draws} signs from {(self.draws + 1) // 2} to {self.draws} can agree"
            )

    def prepare(self, model: nn.Module, batch: ba.Batch, generator: torch.Generator | None) -> ba.Batch:
        """The batch with ``points`` ``[B, S, ...]``, where the gradients are taken."""
        batch = super().prepare(model, batch, generator)
        base = self.base(model, batch)
        points = [self.start.fresh(self.constraint, base, generator) for _ in range(self.draws)]
        return batch.replace(points=torch.stack(points, 1))

    def slope(self, model: nn.Module, batch: ba.Batch) -> Tensor:
        """−s, shaped like δ."""
        points = batch.more["points"].unbind(1)
        votes = sum(ba.input_gradient(self.attack_loss, model, batch, z)[0].sign() for z in points)
        assert isinstance(votes, Tensor)
        return votes.sign() * (votes.abs() >= 2 * self.agree - self.draws)

    def objective(self, model: nn.Module, batch: ba.Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        slope = self.slope(model, batch)
        step, moved = step_policy(self.step).size(batch, slope), (delta - anchor).flatten(1)
        return (slope.flatten(1) * moved).sum(1) + moved.square().sum(1) / (2 * step)

    def solve_at(self, model: nn.Module, batch: ba.Batch, anchor: Tensor, differentiable: bool) -> ba.Solution:
        slope = self.slope(model, batch)
        step = step_policy(self.step).size(batch, slope)
        delta = self.constraint.project(anchor - step * slope, self.base(model, batch))
        gradient = slope + (delta - anchor) / step if differentiable else None
        return ba.Solution(delta, anchor, batch, lam=1 / step, gradient=gradient)


def problem(
    epsilon: float = 8 / 255,
    variant: Literal["zerograd", "multigrad"] = "zerograd",
    quantile: float = 0.35,
    draws: int = 3,
    agree: int | None = None,
    step: float | None = None,
    draw: Draw = "cube",
    label_smoothing: float = 0.0,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """One step along some of the gradient's signs in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        variant: zerograd or multigrad.
        quantile: q; of ZeroGrad.
        draws: S, how many gradients are compared; of MultiGrad.
        agree: T, how many of their signs must agree, all if not given; of MultiGrad.
        step: length of the sign step, 2 ε if not given.
        draw: a uniform start is drawn in the cube [−ε, ε]^d and then clipped to the input range, or in the set C.
        label_smoothing: of the attack's and the training loss, in [0, 1].
        mode: train or eval batch statistics in attack passes.
    """
    one_of("variant", variant, ("zerograd", "multigrad"))
    loss, ball, start = ba.CrossEntropy(label_smoothing), ba.LinfBall(epsilon), uniform(epsilon, draw)
    attack, step = ba.minus(loss), 2 * epsilon if step is None else step
    lower: ba.Linearized
    if variant == "zerograd":
        lower = ba.Linearized(attack, ball, start, large_signs(quantile), step, mode)
    else:
        agree = draws if agree is None else agree
        lower = Agreeing(attack, ball, "zero", "sign", step, mode, start=start, draws=draws, agree=agree)
    return ba.BilevelProblem(ba.UpperProblem(loss), lower)


def recipe() -> dict[str, Recipe]:
    cifar = replace(CIFAR, epochs=30, peak_momentum=None)
    svhn = replace(cifar, epochs=15, lr=0.01, augment="none").playing(quantile=0.7)
    return {"digits": DIGITS, "cifar10": cifar, "cifar100": cifar.playing(quantile=0.45), "svhn": svhn}
