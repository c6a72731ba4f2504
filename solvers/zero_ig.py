"""Zero implicit gradient: dF/dθ ≈ ∇_θ f(θ, δ*), that is w = 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bilevel_at.problem import BilevelProblem
from bilevel_at.solution import Solution
from bilevel_at.solver import Solver

__all__ = ["ZeroIG"]


@dataclass
class ZeroIG(Solver):
    """The attack is treated as a constant: w = 0.

    Exact where dδ*/dθ = 0, which holds almost everywhere for sign-linearised attacks (Fast-BAT paper, equation 7),
    and for min-max problems whose solution is interior. Madry's adversarial training and Fast-AT are this.
    """

    implicit: ClassVar[bool] = False

    def adjoint(self, problem: BilevelProblem, model: nn.Module, solution: Solution, v: Tensor) -> Tensor:
        """w = 0, shaped like v."""
        return torch.zeros_like(v)
