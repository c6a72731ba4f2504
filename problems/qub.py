"""QUB (You and Lee, 2025): the defender minimises a quadratic upper bound of the adversarial loss, around x.

    h = f(x + δ*) − f(x)                                                     (differences of logits)
    q = ℓ(x) + ⟨∇_logits ℓ(x), h⟩ + ¼ ‖h‖²  ≥  ℓ(x + δ*)
    static:  min_θ mean_i q_i         decreasing:  min_θ mean_i (1 − e/E) q_i + (e/E) ℓ(x_i + δ*_i)   in epoch e of E

½ bounds the spectral norm of the softmax' Hessian, diag(p) − ppᵀ, so the quadratic term is ¼‖h‖². An upper loss that
goes with any attacker: ``--of`` names a problem file, whose attacker and threat it takes, with that file's defaults.

Published settings (the authors' code): Fast-AT's attacker with step 1.25 ε in eval mode; f(x) is computed in train
mode, before the attack, and gradients go through all three of its uses. The published script does not train as it is
stored, so training is Fast-AT's here (fastat.py).

When to use it: to put a smooth bound in the place of the adversarial loss under another file's attack, for one more
pass of each batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.losses import check_classes
from bilevel_at.modes import Mode
from bilevel_at.problems.awp import inner_problem, inner_solver
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe


class QuadraticBound(ba.UpperProblem):
    """f = q + share · (ℓ(x + δ) − q), ``[B]``, with q = ℓ(x) + ⟨∇_logits ℓ(x), f(x + δ) − f(x)⟩ + ¼‖f(x + δ) − f(x)‖².

    Args:
        criterion: ℓ, a cross-entropy with any targets t.
        decreasing: the share of ℓ(x + δ) is e/E in epoch e of E, rather than 0.
    """

    def __init__(self, criterion: ba.CrossEntropy = ba.cross_entropy, decreasing: bool = False) -> None:
        self.criterion: ba.CrossEntropy = criterion
        self.share = ba.Schedule(lambda epoch, epochs: epoch / epochs) if decreasing else None

    def prepare(self, model: nn.Module, batch: ba.Batch, generator: torch.Generator | None) -> ba.Batch:
        """The batch with ``clean_logits`` ``[B, K]``, before the attack and with their graph."""
        return batch.replace(clean_logits=ba.logits(model, batch, torch.zeros_like(batch.x)))

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        clean, moved = batch.more["clean_logits"], ba.logits(model, batch, solution.delta)
        wide = torch.promote_types(moved.dtype, torch.float32)  # a difference of bfloat16 logsumexp is mostly rounding
        clean, moved = clean.to(wide), moved.to(wide)
        check_classes(moved, batch)
        change, loss = moved - clean, self.criterion.value(moved, batch)
        # ℓ is logsumexp less ⟨t, ·⟩, and a linear term is its own linearisation: q − ℓ(x + δ) does not depend on t.
        gap = clean.logsumexp(1) + (clean.softmax(1) * change).sum(1) - moved.logsumexp(1)
        bound = loss + gap + change.square().sum(1) / 4
        return bound if self.share is None else bound + self.share.value * (loss - bound)


def problem(
    epsilon: float = 8 / 255,
    of: str = "fastat",
    decreasing: bool = False,
    mode: Mode = "eval",
    label_smoothing: float | None = None,
) -> ba.BilevelProblem:
    """The attacker of another problem file, against the quadratic upper bound.

    Args:
        epsilon: radius ε of the ball.
        of: the problem file whose attacker it is, by its name or path.
        decreasing: the share of the bound falls from 1 in the first epoch to 0 after the last, rather than staying 1.
        mode: train or eval batch statistics in attack passes.
        label_smoothing: of both players, the inner file's own and none if not given.
    """
    given = {} if label_smoothing is None else {"label_smoothing": label_smoothing}
    inner = inner_problem(of, epsilon, **given)
    inner.lower.mode = mode
    criterion = ba.CrossEntropy(0.0 if label_smoothing is None else label_smoothing)
    return ba.BilevelProblem(QuadraticBound(criterion, decreasing), inner.lower, inner.threat)


def solver(epsilon: float = 8 / 255, of: str = "fastat") -> ba.Solver:
    """The solver of the other file."""
    return inner_solver(of, epsilon)


def recipe() -> dict[str, Recipe]:
    return {"digits": DIGITS, "cifar10": CIFAR}
