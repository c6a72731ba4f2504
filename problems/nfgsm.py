"""N-FGSM (de Jorge et al., 2022): one sign step from noise wider than the ball, and no projection onto the ball.

    min_θ  mean_i ℓ_CE(θ, δ*_i)
    η = clip(u) with u ~ U[−kε, kε]^d,      δ* = clip(η + step · sign ∇_δ ℓ_CE(θ, η))

clip keeps x + δ in the input range and nothing else, so that |δ*| reaches kε + step. The network is to withstand the
ball of ε all the same: the problem's threat is LinfBall(ε), and evaluation follows it.

Published settings (the authors' code): k = 2, step ε, the model in train mode throughout; 30 epochs of batch 128,
weight decay 5e-4, rate 0 → 0.2 → 0 linearly, with momentum 0.9 → 0.8 → 0.9 as PyTorch's CyclicLR has it (fastat.py). On
SVHN the rate peaks at 0.05 after 2/5 of the run (here in its middle), and ε and the step grow from 0 in its first 5
epochs; k = 3 at ε = 12/255. A WideResNet-28-10 at ε = 16/255 has k = 4. ``--clip c`` projects δ* onto the ball of
radius cε too. ``--label-smoothing 0.4`` is the setting of the FastAT benchmark, a ResNet-18 trained for 100 epochs with
averaged weights: clean 78.59 %, PGD-50 53.07 %, AutoAttack 47.77 ± 0.41 %, by its own table. On the digits k = 1: with
k = 2 the last epoch's PGD-50-10 accuracy is 8 points lower (seeds 0 and 1).

When to use it: as the first one-step method to try at large ε: it costs what Fast-AT costs. k is to be chosen, since
attacks of training leave the ball.
"""

from __future__ import annotations

from dataclasses import replace

import bilevel_at as ba
from bilevel_at.errors import at_least
from bilevel_at.modes import Mode
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe


def problem(
    epsilon: float = 8 / 255,
    noise: float = 2.0,
    step: float | None = None,
    clip: float | None = None,
    label_smoothing: float = 0.0,
    mode: Mode = "train",
) -> ba.BilevelProblem:
    """One sign step from uniform noise, in the input range.

    Args:
        epsilon: radius ε of the ball that the network is to withstand.
        noise: k; the noise is uniform in [−kε, kε]^d.
        step: length of the sign step, ε if not given.
        clip: c; perturbations are projected onto the ball of radius cε too. Not if not given.
        label_smoothing: of the attack's and the training loss, in [0, 1].
        mode: train or eval batch statistics in attack passes.
    """
    loss, ball = ba.CrossEntropy(label_smoothing), ba.LinfBall(epsilon)
    space = ba.Range() if clip is None else ba.LinfBall(at_least("clip", clip) * epsilon)
    step = epsilon if step is None else step
    lower = ba.Linearized(ba.minus(loss), space, ba.Uniform(at_least("noise", noise) * epsilon), "sign", step, mode)
    return ba.BilevelProblem(ba.UpperProblem(loss), lower, threat=ball)


def recipe() -> dict[str, Recipe]:
    cifar = replace(CIFAR, epochs=30)
    svhn = replace(cifar, lr=0.05, augment="none", epsilon_warmup=5)
    return {"digits": DIGITS.playing(noise=1.0), "cifar10": cifar, "svhn": svhn}
