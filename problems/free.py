"""Free-AT (Shafahi et al., 2019): each batch is replayed m times, and one pass attacks and trains.

    for each batch, m times:   g_θ = mean_i ∇_θ ℓ(θ, δ_i),   g_δ = ∇_δ ℓ(θ, δ)        (one backward pass, at P_C(δ))
                               θ ← θ − rate · g_θ,            δ ← clip(δ + step · sign g_δ, −ε, ε)

δ is carried from replay to replay and, as published, on to the next batch. So the upper level is played at the δ that
its own last pass has left (Algorithm 1).

Published settings: step ε, m = 8 on CIFAR (m = 4 on ImageNet), momentum 0.9. The number of epochs is divided by m, so
that the cost is that of standard training: the ATAS paper (appendix B) runs 10 epochs on CIFAR and 45 on ImageNet,
which are repeated here with the fast methods' training (fastat.py). On the digits m = 4, the epochs are not divided, so
that a run costs 4 standard ones, and the peak rate is 0.05: at 0.1 one seed of five learnt nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.solvers import ZeroIG
from bilevel_at.steps import positive
from bilevel_at.train import CIFAR, DIGITS, IMAGENET, Recipe


class Carried(ba.LowerProblem):
    """δ* is what the passes before have left; this pass' own gradient takes it one sign step further.

    g(θ, δ; z) = λ/2 ‖δ − z‖² with λ = 1 and z the perturbation carried, so δ* = P_C(z), ``[B, ...]``. It does not
    depend on θ, so every solver gives the update above.

    every: begin anew at δ = 0 after so many passes; 0 carries δ from batch to batch.
    """

    hessian_is_lam = True
    learns = True
    mode = "train"

    def __init__(self, constraint: ba.Constraint, step: float, every: int = 0) -> None:
        self.constraint, self.every = constraint, every
        self.step = positive("step", step)
        self.carried: Tensor | None = None
        self.passes = 0

    def objective(self, model: nn.Module, batch: ba.Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        """g ``[B]``."""
        return (delta - anchor).flatten(1).square().sum(1) / 2

    def solve(
        self,
        model: nn.Module,
        batch: ba.Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ba.Solution:
        """P_C of the perturbation carried; of 0 for rows, or image sizes, that none has been carried for."""
        z = self._rows(batch) if anchor is None else anchor.detach()
        return ba.Solution(self.constraint.project(z, batch.x), z, batch, lam=1.0)

    def _rows(self, batch: ba.Batch) -> Tensor:
        """The carried perturbation of the batch's rows, grown by zeros where there are more of them than before."""
        old = self.carried
        if old is None or old.shape[1:] != batch.x.shape[1:]:
            old = batch.x[:0]
        missing = batch.x.new_zeros((max(0, len(batch) - len(old)), *batch.x.shape[1:]))
        self.carried = torch.cat([old, missing])
        return self.carried[: len(batch)].clone()

    def learn(self, solution: ba.Solution, gradient: Tensor) -> None:
        """One sign step up the upper loss, kept in the ball. Rows that a short batch does not use stay."""
        assert self.carried is not None
        rows = len(gradient)
        ball = self.constraint.unbounded()
        self.carried[:rows] = ball.project(solution.anchor + self.step * gradient.sign(), solution.batch.x)
        self.passes += 1
        if self.every and self.passes % self.every == 0:
            self.carried = None

    def state_dict(self) -> dict[str, Any]:
        return {"carried": self.carried, "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        carried = state["carried"]
        self.carried, self.passes = None if carried is None else carried.clone(), state["passes"]


def problem(
    epsilon: float = 8 / 255, replays: int = 8, step: float | None = None, carry: bool = True
) -> ba.BilevelProblem:
    """Batch replay in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        replays: m, the updates made on each batch.
        step: length of the sign step, ε if not given.
        carry: keep δ from batch to batch; otherwise each batch begins at 0, and m = 1 is standard training.
    """
    lower = Carried(ba.LinfBall(epsilon), epsilon if step is None else step, 0 if carry else replays)
    return ba.BilevelProblem(ba.UpperProblem(), lower, replays)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    return {
        "digits": replace(DIGITS, lr=0.05).playing(replays=4),
        "cifar10": replace(CIFAR, epochs=10),
        "imagenet": replace(IMAGENET, epochs=45).playing(replays=4),
    }
