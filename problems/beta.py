"""BETA adversarial training (Robey et al., 2023): the attacker minimises the classification margin, per class.

    η_j ∈ argmax_{η ∈ C(x)} M_j(θ, x + η),   M_j = f_j − f_y,   for every class j ≠ y        (equations 18, 21)
    j*  = argmax_j M_j(θ, x + η_j)                                                             (equations 19, 22)
    min_θ  mean_i ℓ_CE(θ, η_{j*})                                                              (equations 17, 20)

Each η_j is found by an ordinary torch optimiser, RMSprop in the paper, projected onto C after every step. M_j has no
proximal term: under a KKT solver the curvature is ``damping``, by default that of one more step, 1/step.

Published settings (section 5): ε = 8/255, step 2/255, 10 steps in training and 30 in evaluation. The paper's
schedule is long, with a decay at epoch 100; here it is multistep over 110 epochs, on a ResNet-18. smooth_beta.py keeps
every η_j.

When to use it: where robust accuracy counts more than time: the attacker climbs the margin of every class, so the cost
of a step grows with the number of classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

import bilevel_at as ba
from bilevel_at.modes import Mode
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.solvers import SOLVERS, PlainName


def attacker(
    epsilon: float, steps: int, step: float, optim: str, mode: Mode, keep: Literal["best", "all"] = "best"
) -> ba.Targeted:
    """The lower level: one problem per class j ≠ y, by the optimiser of that name."""
    optimizer = getattr(torch.optim, optim, None)
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise ba.InputError(f"optim {optim!r} is not an optimiser of torch.optim; RMSprop, Adam and SGD are")
    return ba.Targeted(ba.LinfBall(epsilon), optimizer=optimizer, steps=steps, step=step, keep=keep, mode=mode)


def problem(
    epsilon: float = 8 / 255,
    steps: int = 10,
    step: float = 2 / 255,
    optim: str = "RMSprop",
    label_smoothing: float = 0.0,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """The negative-margin attacker in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        steps: optimiser steps of the attack.
        step: their learning rate.
        optim: the attack's optimiser, a class of torch.optim.
        label_smoothing: share of the label that is spread over all classes, in the training loss.
        mode: train or eval batch statistics in attack passes.
    """
    return ba.BilevelProblem(
        ba.UpperProblem(ba.CrossEntropy(label_smoothing)), attacker(epsilon, steps, step, optim, mode)
    )


def solver(name: PlainName = "zero-ig", step: float = 2 / 255) -> ba.Solver:
    """ZeroIG as published."""
    made: ba.Solver = SOLVERS[name]()
    if isinstance(made, ba.KKTSolver):
        made.damping = 1 / step
    return made


def recipe() -> dict[str, Recipe]:
    cifar = replace(CIFAR, model="resnet18", epochs=110, lr=0.1, schedule="multistep", milestones=(100,))
    return {"digits": DIGITS.playing(step=0.05, steps=5), "cifar10": cifar}
