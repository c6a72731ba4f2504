"""BETA adversarial training (Robey et al., 2023): the attacker minimises the classification margin, per class.

    η_j ∈ argmax_{η ∈ C(x)} M_j(θ, x + η),   M_j = f_j − f_y,   for every class j ≠ y        (equations 18, 21)
    j*  = argmax_j M_j(θ, x + η_j)                                                             (equations 19, 22)
    min_θ  mean_i ℓ_CE(θ, η_{j*})                                                              (equations 17, 20)

Smooth BETA (Algorithm 3) keeps every η_j: upper loss Σ_{j≠y} w_j ℓ_CE(θ, η_j), w = softmax_j(μ M_j(θ, x + η_j)),
with gradients through w.

Each η_j is found by an ordinary torch optimiser, RMSprop in the paper, projected onto C after every step. M_j has no
proximal term: under a KKT solver the curvature is ``damping``, by default that of one more step, 1/step.

Published settings (section 5): ε = 8/255, step 2/255, 10 steps in training and 30 in evaluation. The paper's
schedule is long, with a decay at epoch 100; here it is multistep over 110 epochs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.modes import Mode
from bilevel_at.solvers import FullKKT, HessianFreeKKT, SolverName, ZeroIG
from bilevel_at.targeted import other_classes
from bilevel_at.train import Recipe


class SmoothMargin(ba.UpperProblem):
    """f = Σ_{j≠y} softmax_j(μ M_j(x + η_j)) ℓ_CE(x + η_j), ``[B]`` (Algorithm 3, equation 34).

    ``delta`` has a row per example and class, as :class:`~bilevel_at.Targeted` with ``keep="all"`` returns them.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ba.InputError(f"temperature is {temperature:g}; μ must be positive")
        self.temperature = temperature

    def loss(self, model: nn.Module, batch: ba.Batch, delta: Tensor) -> Tensor:
        """f ``[B]`` from ``delta`` ``[B · (K − 1), ...]``; gradients go through the weights."""
        each = len(delta) // len(batch)
        wide = batch.repeat(each)
        out = ba.logits(model, wide, delta)
        targets = other_classes(batch.y, each + 1).flatten()
        own = out.gather(1, wide.y[:, None]).squeeze(1)
        margin = out.gather(1, targets[:, None]).squeeze(1) - own
        weights = torch.softmax(self.temperature * margin.reshape(-1, each), 1)
        losses = nn.functional.cross_entropy(out, wide.y, reduction="none").reshape(-1, each)
        return (weights * losses).sum(1)


def problem(
    epsilon: float = 8 / 255,
    steps: int = 10,
    step: float = 2 / 255,
    optim: str = "RMSprop",
    smooth: bool = False,
    temperature: float = 1.0,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """The negative-margin attacker in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        steps: optimiser steps of the attack.
        step: their learning rate.
        optim: the attack's optimiser, a class of torch.optim.
        smooth: keep every class's perturbation, weighted (Algorithm 3).
        temperature: μ of the smooth variant.
        mode: train or eval batch statistics in attack passes.
    """
    optimizer = getattr(torch.optim, optim, None)
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise ba.InputError(f"optim {optim!r} is not an optimiser of torch.optim; RMSprop, Adam and SGD are")
    keep: Literal["best", "all"] = "all" if smooth else "best"
    lower = ba.Targeted(ba.LinfBall(epsilon), optimizer=optimizer, steps=steps, step=step, keep=keep, mode=mode)
    return ba.BilevelProblem(SmoothMargin(temperature) if smooth else ba.UpperProblem(), lower)


def solver(name: SolverName = "zero-ig", step: float = 2 / 255) -> ZeroIG | HessianFreeKKT | FullKKT:
    """ZeroIG as published."""
    if name == "hessian-free-kkt":
        return HessianFreeKKT(damping=1 / step)
    if name == "full-kkt":
        return FullKKT(damping=1 / step)
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    cifar = Recipe(epochs=110, schedule="multistep", milestones=(100,), augment="crop-flip")
    return {
        "digits": Recipe(batch_size=64, problem={"epsilon": 0.2, "step": 0.05, "steps": 5}),
        "cifar10": cifar,
        "cifar100": cifar,
    }
