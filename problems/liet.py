"""LIET (Pan et al., 2025): FGSM from perturbations of grey images, one for each class, under random targets.

    U_k = ε · sign ∇_δ ℓ_R(θ, grey image, class k),  in eval mode, in every 20th batch
    z = ±U_y, with uniform noise in its place where v < ρ, clipped to the input range,    v ~ U[0, 1]^d
    δ* = P_C(z + ε · sign ∇_δ ℓ_R(θ, z))
    min_θ  mean_i ℓ_R(θ, δ*_i) + λ (e + 1)/E · JS(p(x_i + z_i), p(x_i + δ*_i)) in epoch e of E, from 0

ρ, uniform in [ρ₀, ρ₁], and the sign ±, a fair coin, are one draw for the batch. The targets R have 1 − label_smoothing
on the label, and the rest on the other classes in proportion to uniform draws, new ones in every call of the loss. JS
is the Jensen-Shannon divergence of p = softmax(f_θ); gradients in θ go through both predictions, and the pass at z is
shared by the attack and the second term.

Published settings (the authors' code) at 8/255: label_smoothing 0.6, λ = 100, ρ 0.1 … 0.5, noise in [−ε, ε]; at 16/255:
``--label-smoothing 0.4 --coefficient 20 --rho-low 0 --rho-high 1 --noise 2 --every 10 --no-project``, so that δ* is
clipped to the input range only, as N-FGSM's is. Train mode but for the grey images; ResNet-18, 100 epochs of batch 128,
1,000 images held out (``--held-out 1000``), weight decay 5e-4, rate by PyTorch's OneCycleLR an epoch at a time with
peak 0.1, and with it momentum 0.95 → 0.85 → 0.95, averaged weights (0.9995 a step). The authors' logs (ResNet-18, seeds
0 to 2) have at 8/255 clean 80.95, 80.89, 79.98 %, PGD-50 56.08, 56.00, 56.17 %, AutoAttack 50.08, 49.89, 50.06 %; at
16/255 clean 55.33, 47.75, 55.07 %, PGD-50 34.04, 31.07, 34.20 %, AutoAttack 25.48, 24.65, 25.54 %. On the digits λ = 10
and label_smoothing 0.2.

When to use it: for one-step training from starts that depend on the class. λ and the label smoothing may need another
choice on other data: on the digits they did.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.anchors import Attacker
from bilevel_at.draws import rand
from bilevel_at.errors import at_least, finite, whole_number
from bilevel_at.losses import as_loss, check_classes
from bilevel_at.modes import Mode, no_graph
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.steps import step_policy


class RandomTargets(ba.Loss):
    """−Σ_k t_k log softmax(f_θ(x + δ))_k, ``[B]``, with share spread at random over the classes other than the label.

    The targets t are drawn once for each solve and once for the training loss, in ``prepare``.

    Args:
        share: in [0, 1].
    """

    def __init__(self, share: float) -> None:
        if not 0 <= finite("label_smoothing", share) <= 1:
            raise ba.InputError(f"label_smoothing is {share:g}; it must be from 0 to 1")
        self.share = share
        self.classes: int | None = None

    def prepare(self, model: nn.Module, batch: ba.Batch, generator: torch.Generator | None) -> ba.Batch:
        """The batch with ``targets`` ``[B, K]``. A pass of one example says what K is, until a step has."""
        classes = self.classes
        if classes is None:
            with ba.attack_mode(model, "eval"), no_graph():
                classes = int(model(batch.x[:1]).shape[-1])
        draws = rand((len(batch), classes), generator, dtype=batch.x.dtype, device=batch.x.device)
        label = check_classes(draws, batch)[:, None]
        draws = draws.scatter(1, label, 0.0)
        total = draws.sum(1, keepdim=True).clamp(min=torch.finfo(draws.dtype).tiny)
        return batch.replace(targets=(self.share * draws / total).scatter(1, label, 1 - self.share))

    def value(self, output: Tensor, batch: ba.Batch) -> Tensor:
        targets = batch.more["targets"]
        if targets.shape != output.shape:
            raise ba.InputError(
                f"the model gives {tuple(output.shape)}, and this problem was trained with {targets.shape[1]} classes; "
                "make a new one for another network"
            )
        return -(targets * F.log_softmax(output, 1)).sum(1)

    def observe(self, step: ba.Hypergradient) -> None:
        self.classes = step.solution.batch.more["targets"].shape[1]


class OfGreyImages(ba.Anchor):
    """z = ±U_y, in part replaced by noise. U ``[K, ...]`` is taken anew in every n-th batch of an epoch.

    Args:
        step: ε, the size of U.
        noise: radius of the noise.
        low: ρ₀.
        high: ρ₁; 0 ≤ ρ₀ ≤ ρ₁ ≤ 1.
        every: n, at least 1.
    """

    def __init__(self, step: float, noise: float, low: float, high: float, every: int) -> None:
        if not 0 <= finite("rho_low", low) <= finite("rho_high", high) <= 1:
            raise ba.InputError(f"rho_low is {low:g} and rho_high {high:g}; they must be in order, from 0 to 1")
        self.step, self.noise = step_policy(step), ba.Uniform(noise, clip=False)
        self.low, self.high, self.every = low, high, whole_number("every", every, 1)
        self.counter = ba.Counter()
        self.universal: Tensor | None = None

    def draw(
        self, lower: Attacker, model: nn.Module, batch: ba.Batch, generator: torch.Generator | None
    ) -> tuple[Tensor, Any]:
        """(z ``[B, ...]``, U as it is now)."""
        base, y, classes = lower.base(model, batch), batch.y, batch.more["targets"].shape[1]
        universal = self.universal
        old = universal is None or universal.shape != (classes, *base.shape[1:])
        if universal is None or old or self.counter.count % self.every == 0:
            universal = self._of_grey(lower, model, base, classes, generator)
        assert y is not None  # the loss has looked at the labels
        mask = rand(base.shape, generator, dtype=base.dtype, device=base.device)
        rho, coin = torch.rand(2, generator=generator, dtype=base.dtype, device=base.device)
        noise = self.noise.fresh(lower.constraint, base, generator)
        z = torch.where(mask < self.low + (self.high - self.low) * rho, noise, universal[y].to(base))
        z = torch.where(coin < 0.5, -z, z)
        return torch.clamp(base + z, 0, 1) - base, universal

    def _of_grey(
        self, lower: Attacker, model: nn.Module, base: Tensor, classes: int, generator: torch.Generator | None
    ) -> Tensor:
        """U_k for each class k."""
        grey = torch.full((classes, *base.shape[1:]), 0.5, dtype=base.dtype, device=base.device)
        loss = as_loss(lower.attack_loss)
        with ba.attack_mode(model, "eval"), shares.alike():
            batch = loss.prepare(model, ba.Batch(grey, torch.arange(classes, device=base.device)), generator)
            gradient, _ = ba.input_gradient(loss, model, batch, torch.zeros_like(grey))
        return -gradient.sign() * self.step.size(batch, gradient)

    def observe(self, step: ba.Hypergradient) -> None:
        if step.solution.memo is not None:
            self.universal = step.solution.memo

    def state_dict(self) -> dict[str, Any]:
        return {"universal": self.universal}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.universal = None if state["universal"] is None else state["universal"].clone()


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q)/2, of softmax(logits) ``[B, K]``, ``[B]``."""
    log_p, log_q = F.log_softmax(first, 1), F.log_softmax(second, 1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1) / 2


class Consistency(ba.UpperProblem):
    """f = ℓ(θ, δ) + coefficient (e + 1)/E · JS(p(x + z), p(x + δ)), ``[B]``; the attack has made the pass at z.

    Args:
        loss: ℓ.
        coefficient: at least 0.
    """

    def __init__(self, loss: ba.Loss, coefficient: float) -> None:
        most = at_least("coefficient", coefficient)
        self.criterion: ba.Loss = loss
        self.weight = ba.Schedule(lambda epoch, epochs: most * (epoch + 1) / epochs)

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        moved = ba.logits(model, batch, solution.delta)
        return self.criterion.value(moved, batch) + self.weight.value * jensen_shannon(solution.output, moved)


def problem(
    epsilon: float = 8 / 255,
    coefficient: float = 100.0,
    rho_low: float = 0.1,
    rho_high: float = 0.5,
    noise: float = 1.0,
    every: int = 20,
    project: bool = True,
    label_smoothing: float = 0.6,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """One sign step of ε from a class's perturbation of a grey image.

    Args:
        epsilon: radius ε of the ball that the network is to withstand.
        coefficient: λ, weight of the divergence in the last epoch.
        rho_low: ρ₀, the least share of noise in the start.
        rho_high: ρ₁, the greatest share of noise in the start.
        noise: radius of the noise, as a multiple of ε.
        every: batches from one look at the grey images to the next.
        project: project perturbations onto the ball of ε too, and not onto the input range alone.
        label_smoothing: share of the other classes in the targets of the attack's and the training loss.
        mode: train or eval batch statistics in attack passes.
    """
    loss, ball = RandomTargets(label_smoothing), ba.LinfBall(epsilon)
    anchor = OfGreyImages(epsilon, at_least("noise", noise) * epsilon, rho_low, rho_high, every)
    space = ball if project else ba.Range()
    lower = ba.Linearized(ba.minus(loss), space, anchor, "sign", epsilon, mode, keep_output=True)
    return ba.BilevelProblem(Consistency(loss, coefficient), lower, threat=ball)


def recipe() -> dict[str, Recipe]:
    cifar = replace(
        CIFAR,
        model="resnet18",
        epochs=100,
        lr=0.1,
        schedule="one-cycle-by-epoch",
        momentum=0.95,
        peak_momentum=0.85,
        ema=0.9995,
        select="pgd-10-1",
    )
    return {"digits": DIGITS.playing(coefficient=10.0, label_smoothing=0.2), "cifar10": cifar}
