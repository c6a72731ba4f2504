"""ATAS (Huang et al., 2023): remembered perturbations and a step for every sample; ATTA with a constant step.

    v_i ← β v_i + (1 − β) ‖∇_δ ℓ(θ, z_i)‖²            step_i = γ / (c + √v_i)                 (equations 3, 4)
    δ*_i = P_C(z_i + step_i · sign ∇_δ ℓ(θ, z_i)),    z_i = δ*_i of the last epoch             (equation 5)

Perturbations live on the padded canvas and move through the same crop and flip as their image.

Published settings (experiments, appendix B and the authors' code): γ/c = 16/255, β = 0.5, and c = 0.01 for gradients
of the mean over 128 samples, so c = 1.28 for the per-sample gradients used here; steps clipped to 4/255 … 14/255; a
constant step ε in the first 5 epochs; perturbations redrawn every 10 epochs; attacks in eval mode; 30 epochs of batch
128, rate 0.1, divided by 10 after epochs 24 and 28. ATTA: ``--step 4/255``. On the digits γ/c = 2ε and the same
proportions; c = 1.28 is not tuned there.
"""

from __future__ import annotations

import bilevel_at as ba
from bilevel_at.modes import Mode
from bilevel_at.solvers import ZeroIG
from bilevel_at.train import Recipe


def problem(
    epsilon: float = 8 / 255,
    step: float | None = None,
    max_step: float | None = None,
    c: float = 1.28,
    beta: float = 0.5,
    warmup_epochs: int = 5,
    reset_every: int = 10,
    mode: Mode = "eval",
) -> ba.BilevelProblem:
    """Sign steps of adaptive length from remembered perturbations in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        step: a constant step instead of the adaptive one (ATTA).
        max_step: γ/c, the step where gradients vanish; 2 ε if not given.
        c: added to √v, on the scale of per-sample gradient norms.
        beta: momentum of v.
        warmup_epochs: epochs with the constant step ε.
        reset_every: epochs after which perturbations are drawn anew; 0 for never.
        mode: train or eval batch statistics in attack passes.
    """
    ball = ba.LinfBall(epsilon)
    policy: ba.Step | float
    if step is not None:
        policy = step
    else:
        top = 2 * epsilon if max_step is None else max_step
        policy = ba.Adaptive(
            gamma=top * c,
            c=c,
            beta=beta,
            low=0.5 * epsilon,
            high=1.75 * epsilon,
            warmup_step=epsilon,
            warmup_epochs=warmup_epochs,
        )
    anchor = ba.Remembered(reset_every)
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ball, anchor=anchor, direction="sign", step=policy, mode=mode)
    return ba.BilevelProblem(ba.UpperProblem(), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    cifar = Recipe(lr=0.1, schedule="multistep", milestones=(24, 28), augment="crop-flip")
    return {
        "digits": Recipe(batch_size=64, problem={"epsilon": 0.2}),
        "cifar10": cifar,
        "cifar100": cifar,
    }
