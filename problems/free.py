"""Free-AT (Shafahi et al., 2019): each batch is replayed m times, and one pass attacks and trains.

    for each batch, m times:   g_θ = mean_i ∇_θ ℓ(θ, δ_i),   g_δ = ∇_δ ℓ(θ, δ)        (one backward pass, at P_C(δ))
                               θ ← θ − rate · g_θ,            δ ← clip(δ + step · sign g_δ, −ε, ε)

δ is carried from replay to replay and, as published, on to the next batch. So the upper level is played at the δ that
its own last pass has left (Algorithm 1).

Published settings: step ε, m = 8 on CIFAR (m = 4 on ImageNet), momentum 0.9. The number of epochs is divided by m, so
that the cost is that of standard training: the ATAS paper (appendix B) runs 10 epochs on CIFAR and 45 on ImageNet,
which are repeated here with the fast methods' training (fastat.py), on CIFAR with a peak rate of 0.04. On the digits
m = 4, the epochs are not divided, so that a run costs 4 standard ones, and the peak rate is 0.05: at 0.1 one seed of
five learnt nothing.

When to use it: where the budget is counted in passes: m replays cost m standard steps, and each of them is an update.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.errors import at_least, positive, whole_number
from bilevel_at.policy import Number, checked, number
from bilevel_at.runs.recipe import CIFAR, DIGITS, IMAGENET, Recipe
from bilevel_at.solvers import ZeroIG


class Carried(ba.Anchor):
    """z is what the passes before have left, by position in the batch; each pass takes it one sign step further.

    Args:
        step: length of the sign step.
        radius: ε; z is clipped to [−ε, ε].
        restart_every: begin anew at 0 after so many passes; 0 carries δ from batch to batch.
    """

    def __init__(self, step: Number, radius: Number, restart_every: int = 0) -> None:
        self.step, self.radius = checked(positive, "step", step), checked(at_least, "radius", radius)
        self.restart_every = whole_number("restart_every", restart_every, 0)
        self.memory, self.passes = ba.SampleMemory(by="position"), 0

    def draw(
        self, lower: Any, model: nn.Module, batch: ba.Batch, generator: torch.Generator | None
    ) -> tuple[Tensor, None]:
        """The rows carried; 0 for rows, or image sizes, that none has been carried for."""
        return self.memory.read(batch, torch.zeros_like(batch.x)), None

    def observe(self, step: ba.Hypergradient) -> None:
        """One sign step up the upper loss, kept in the cube. Rows that a short batch does not use stay."""
        solution = step.solution
        radius = number(self.radius)
        moved = (solution.anchor + number(self.step) * step.v.sign()).clamp(-radius, radius)
        self.memory.write(solution.batch, moved)
        self.passes += 1
        if self.restart_every and self.passes % self.restart_every == 0:
            self.memory.clear()

    def state_dict(self) -> dict[str, Any]:
        return {**self.memory.state_dict(), "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state)
        self.passes = state["passes"]


def problem(
    epsilon: float = 8 / 255,
    step: float | None = None,
    restart_every: int = 0,
    label_smoothing: float = 0.0,
) -> ba.BilevelProblem:
    """Batch replay in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        step: length of the sign step, ε if not given.
        restart_every: begin anew at δ = 0 after so many updates; the number of replays begins each batch there, and 0
            carries δ from batch to batch.
        label_smoothing: share of the label that is spread over all classes.
    """
    loss = ba.CrossEntropy(label_smoothing)
    anchor = Carried(epsilon if step is None else step, epsilon, restart_every)
    return ba.BilevelProblem(ba.UpperProblem(loss), ba.AtAnchor(ba.LinfBall(epsilon), anchor))


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    return {
        "digits": replace(DIGITS, lr=0.05, replays=4),
        "cifar10": replace(CIFAR, epochs=10, replays=8, lr=0.04),
        "imagenet": replace(IMAGENET, epochs=45, replays=4),
    }
