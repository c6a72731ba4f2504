"""Remembered Fast-BAT, a combination nobody has published: Fast-BAT's attacker with ATAS' memory and ATAS' step.

    v_i ← β v_i + (1 − β) ‖∇_δ ℓ(θ, z_i)‖²            1/λ_i = γ / (c + √v_i)
    δ*_i(θ) = P_C(z_i − ∇_δ ℓ_atk(θ, z_i) / λ_i),     z_i = δ*_i of the last epoch
    dF/dθ = ∇_θ ℓ_CE − ig_weight · ∇_θ ⟨∇_δ ℓ_atk(θ, z), 1_F ⊙ ∇_δ ℓ_CE / λ⟩

Nothing here is new but the choice of anchor and step: the example of how published parts go together. The anchor costs
no pass, so a step costs 2 passes less than Fast-BAT's. γ/c is Fast-BAT's 1/λ, c and β are ATAS', attacks see the model
in eval mode as ATAS' do, and ig_weight is Fast-BAT's 0.1 λ at γ/c. Settings are a first guess, not tuned.

When to use it: as an example of a composition. On the digits it cannot be told from ATAS, at nearly twice its cost.
"""

from __future__ import annotations

import bilevel_at as ba
from bilevel_at.errors import positive
from bilevel_at.modes import Mode
from bilevel_at.problems import atta, fastbat
from bilevel_at.runs.recipe import DIGITS, Recipe
from bilevel_at.solvers import PlainName


def problem(
    epsilon: float = 8 / 255,
    max_step: float | None = None,
    c: float = 1.28,
    beta: float = 0.5,
    reset_every: int = 10,
    size: int | None = None,
    label_smoothing: float = 0.0,
    mode: Mode = "eval",
) -> ba.BilevelProblem:
    """The Taylor-linearised attacker from remembered perturbations, with a step for every example, in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        max_step: γ/c, the step where gradients vanish; Fast-BAT's 1/λ if not given.
        c: added to √v, on the scale of per-sample gradient norms.
        beta: momentum of v.
        reset_every: epochs after which perturbations are drawn anew; 0 for never.
        size: keep perturbations resized to size × size; at full size if not given.
        label_smoothing: share of the label that is spread over all classes, for both players.
        mode: train or eval batch statistics in attack passes.
    """
    top = fastbat.published_step(epsilon) if max_step is None else max_step
    gamma = positive("max_step", top) * positive("c", c)
    policy, anchor = ba.Adaptive(gamma, c, beta), ba.Remembered(reset_every=reset_every, size=size)
    loss = ba.CrossEntropy(label_smoothing)
    lower = ba.Linearized(ba.minus(loss), ba.LinfBall(epsilon), anchor, "taylor", policy, mode)
    return ba.BilevelProblem(ba.UpperProblem(loss), lower)


def solver(
    name: PlainName = "hessian-free-kkt",
    epsilon: float = 8 / 255,
    max_step: float | None = None,
    ig_factor: float = 0.1,
) -> ba.Solver:
    """Fast-BAT's, with 1/λ at its largest.

    Args:
        ig_factor: the published α₂/(λα₁); the solver's ig_weight is this times λ.
    """
    return fastbat.solver(name, epsilon, max_step, ig_factor)


def recipe() -> dict[str, Recipe]:
    return {**atta.recipe(), "digits": DIGITS.playing(max_step=20.0)}
