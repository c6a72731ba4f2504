"""A composition by flags: any anchor, direction, step and upper loss of the other files, one of each.

    δ*(θ) = P_C(z − step · D(∇_δ ℓ_atk(θ, z))),      ℓ_atk = −ℓ_CE            (Fast-BAT paper, equations 5 to 9)
    min_θ  mean_i f(θ, δ*_i)

z is ``--anchor``, after ``--steps`` − 1 projected steps with the same D; D is ``--direction``, the step ``--step``
(sign) or ``--taylor-step`` (1/λ), f ``--upper`` and, with ``--gamma``, at the weights that raise it (awp.py). As they
stand the flags are Fast-AT's attack with a step of ε, in eval mode. Methods of other files are compositions:

    --anchor zero                                                    FGSM (fgsm.py)
    --anchor noise                                                   N-FGSM (nfgsm.py): not projected onto the ball
    --anchor remembered [--adaptive]                                 ATTA, ATAS (atta.py, atas.py)
    --anchor gradient-step --direction taylor --solver hessian-free-kkt        Fast-BAT (fastbat.py)
    --steps 7                                                        PGD-7 (minmax.py)
    --upper qub | trades | gradalign                                 QUB, TRADES' loss, GradAlign (qub.py, …)

with the mode that ``--mode`` says (published modes differ; docs/methods.md lists them). ``--adaptive`` has ATAS' ratios
to ε: steps of ε/2 … 1.75 ε towards 2ε, c = 1.28, β = 0.5 and a step of ε in the first 5 epochs; unsigned ones are
those of remembered_fastbat.py.

Published settings: none; nobody has published most of these. Training is Fast-AT's (fastat.py).

When to use it: to exchange one part of a method and nothing else, or to look for a better composition from the command
line. benchmarks/parts.py does both.
"""

from __future__ import annotations

from typing import Literal

import bilevel_at as ba
from bilevel_at.errors import at_least, one_of, positive
from bilevel_at.modes import Mode
from bilevel_at.problems.awp import AWP
from bilevel_at.problems.fastbat import published_step
from bilevel_at.problems.gradalign import GradAlign, published_coefficient
from bilevel_at.problems.qub import QuadraticBound
from bilevel_at.problems.trades import Tradeoff
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.solvers import SOLVERS, FullKKT, Neumann, PlainName, ZeroIG

AnchorName = Literal["zero", "uniform", "corner", "noise", "remembered", "sign-step", "gradient-step"]
UpperName = Literal["cross-entropy", "qub", "trades", "gradalign"]
C, BETA = 1.28, 0.5  # of ATAS, for gradients of single examples
WARMUP = 5  # epochs


def anchor_of(name: AnchorName, epsilon: float, noise: float, reset_every: int, taylor_step: float) -> ba.Anchor:
    """z by its name."""
    start = ba.Uniform(epsilon)
    anchors: dict[AnchorName, ba.Anchor] = {
        "zero": ba.Zero(),
        "uniform": start,
        "corner": ba.Corner(),
        "noise": ba.Uniform(at_least("noise", noise) * epsilon),
        "remembered": ba.Remembered(reset_every=reset_every),
        "sign-step": ba.Steps(start, "sign", step=0.5 * epsilon),
        "gradient-step": ba.Steps(start, "taylor", step=taylor_step),
    }
    one_of("anchor", name, tuple(anchors))
    return anchors[name]


def upper_of(
    name: UpperName, epsilon: float, weight: float | None, loss: ba.CrossEntropy, mode: Mode
) -> ba.UpperProblem:
    """f by its name; ``weight`` of the divergence (6) or of the alignment (GradAlign's for this ε)."""
    one_of("upper", name, ("cross-entropy", "qub", "trades", "gradalign"))
    if weight is not None and name not in ("trades", "gradalign"):
        raise ba.InputError(f"weight is {weight:g}, and upper is {name}, which has none; leave it out")
    if name == "qub":
        return QuadraticBound(loss)
    if name == "trades":
        return Tradeoff(6.0 if weight is None else weight, loss)
    if name == "gradalign":
        coefficient = published_coefficient(epsilon) if weight is None else weight
        return GradAlign(ba.minus(loss), epsilon, coefficient, True, mode, False, loss)
    return ba.UpperProblem(loss)


def problem(
    epsilon: float = 8 / 255,
    anchor: AnchorName = "uniform",
    noise: float = 2.0,
    reset_every: int = 10,
    direction: Literal["sign", "taylor"] = "sign",
    step: float | None = None,
    taylor_step: float | None = None,
    steps: int = 1,
    adaptive: bool = False,
    upper: UpperName = "cross-entropy",
    weight: float | None = None,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    mode: Mode = "eval",
) -> ba.BilevelProblem:
    """A linearised attacker in an ℓ∞ ball, and an upper loss.

    Args:
        epsilon: radius ε of the ball that the network is to withstand.
        anchor: where the attack is linearised, or where its first step begins.
        noise: k; the anchor "noise" is uniform in [−kε, kε]^d, and attacks from it stay in the input range alone.
        reset_every: epochs after which remembered perturbations are drawn anew; 0 for never.
        direction: D, the gradient's signs or the gradient itself.
        step: length of a sign step; ε if not given, or ε/4 where there are several.
        taylor_step: 1/λ, of steps along the gradient itself; Fast-BAT's for ε if not given.
        steps: how many of them.
        adaptive: a step for every example, by ATAS' rule.
        upper: the loss that training lowers.
        weight: of the divergence in trades, 6 if not given, or the alignment in gradalign, published for ε if not.
        gamma: length of AWP's perturbation of a weight, as a share of the weight's; 0 for none.
        label_smoothing: share of the label that is spread over all classes, for both players.
        mode: train or eval batch statistics in attack passes.
    """
    taylor = published_step(epsilon) if taylor_step is None else positive("taylor_step", taylor_step)
    signed = one_of("direction", direction, ("sign", "taylor")) == "sign"
    if step is not None and not signed:
        raise ba.InputError(f"step is {step:g}, and direction taylor takes taylor_step; give that instead")
    if step is not None and adaptive:
        raise ba.InputError(f"step is {step:g}, and adaptive steps have a rule of their own; leave it out")
    length = taylor if not signed else step if step is not None else epsilon if steps == 1 else epsilon / 4
    policy: ba.Step | float = length
    if adaptive and signed:
        policy = ba.Adaptive(
            2 * epsilon * C, C, BETA, low=epsilon / 2, high=1.75 * epsilon, warmup_step=epsilon, warmup_epochs=WARMUP
        )
    elif adaptive:
        policy = ba.Adaptive(taylor * C, C, BETA)
    loss, ball = ba.CrossEntropy(label_smoothing), ba.LinfBall(epsilon)
    space = ba.Range() if anchor == "noise" else ball
    start = anchor_of(anchor, epsilon, noise, reset_every, taylor)
    lower = ba.Linearized.pgd(ba.minus(loss), space, steps, policy, start, direction, mode)
    defender = upper_of(upper, epsilon, weight, loss, mode)
    return ba.BilevelProblem(AWP(defender, gamma) if gamma else defender, lower, threat=ball)


def solver(
    name: PlainName = "zero-ig", epsilon: float = 8 / 255, taylor_step: float | None = None, ig_factor: float = 0.1
) -> ba.Solver:
    """No implicit term; other solvers have Fast-BAT's weight (fastbat.py).

    Args:
        ig_factor: the solver's ig_weight is this times λ = 1/taylor_step.
    """
    if name == "zero-ig":
        return ZeroIG()
    weight = ig_factor / (published_step(epsilon) if taylor_step is None else taylor_step)
    made: ba.Solver = SOLVERS[name](ig_weight=weight)
    if isinstance(made, FullKKT | Neumann):
        made.curvature = "attack"
    return made


def recipe() -> dict[str, Recipe]:
    return {"digits": DIGITS.playing(taylor_step=20.0, noise=1.0), "cifar10": CIFAR}
