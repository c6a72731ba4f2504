"""Which solver's hypergradient is exact for a problem, read off a solution of its lower level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bilevel_at.batch import Batch
from bilevel_at.constraints import Constraint
from bilevel_at.modes import attack_mode
from bilevel_at.problem import BilevelProblem, attack_mode_of
from bilevel_at.solver import Solver

__all__ = ["Exact", "exact_solver"]

EXACT_VALUES = {"ig_weight": 1.0, "damping": 0.0, "cross_at": "anchor", "curvature": "lower"}
"""The values of a solver's fields at which it is what its class promises."""


@dataclass(frozen=True)
class Exact:
    """solver: the name of the cheapest class that is exact, or "" where none is. why: in words."""

    solver: str
    why: str

    def of(self, solver: Solver) -> str:
        """What keeps ``solver`` from being exact, in words; "" where nothing does, as far as its fields say."""
        name, branches = type(solver).__name__, [part for _, part in solver.mixture()]
        if branches == [solver] and type(solver).hypergradient is not Solver.hypergradient:
            return f"{name} has a hypergradient of its own"
        if not self.solver or self.solver == "ZeroIG":
            return ""  # no solver is exact, or each is
        if branches == [solver] and not solver.implicit:
            return f"{name} leaves the implicit term out"
        differs = [
            f"{field} = {_short(getattr(part, field))}"
            for part in branches
            for field, exact in EXACT_VALUES.items()
            if getattr(part, field, exact) != exact and part.implicit
        ]
        differs += ["the implicit term now and then, exact on average"] if len(branches) > 1 else []
        return f"{name} has {', '.join(differs)}" if differs else ""


def exact_solver(
    problem: BilevelProblem, model: nn.Module, batch: Batch, generator: torch.Generator | None = None
) -> Exact:
    """The cheapest solver that is exact for the lower problem, by what its solution on a few examples says of itself.

    A solution without a gradient has no derivative in θ; one whose gradient has no graph does not depend on θ; and
    :meth:`~bilevel_at.LowerProblem.curvature` says whether the Hessian in δ is λI. (docs/solvers.md)

    Args:
        problem: the two players.
        model: the network.
        batch: a few examples.
        generator: for what is drawn at random.

    Raises:
        Exception: what the lower problem's ``solve`` raises.
    """
    lower = problem.lower
    solution = lower.solve(model, batch, generator=generator, differentiable=True)
    if solution.gradient is None:
        return Exact("", "δ* has no derivative in θ; ZeroIG is the solver that needs none")
    if not solution.gradient.requires_grad:
        return Exact("ZeroIG", "δ* does not depend on θ (almost everywhere), so that the implicit term is 0")
    with attack_mode(model, attack_mode_of(lower)):
        curved, _ = lower.curvature(model, solution)
    has_active_set = type(lower.constraint).active is not Constraint.active
    if curved is None:
        if has_active_set:
            return Exact("HessianFreeKKT", "the Hessian of g is λI")
        return Exact("ProjectionAdjoint", "the Hessian of g is λI, and the constraint defines project alone")
    if not has_active_set:
        return Exact("", "g is curved, and the constraint has no active set, which FullKKT needs")
    if solution.residual is None:
        return Exact("", "g is curved, and its steps stop short of a minimiser; FullKKT is exact at one")
    return Exact("FullKKT", "g is curved; exact where it is strongly convex on the free directions")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
