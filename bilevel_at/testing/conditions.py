"""What holds of a δ* that solves its lower level: it is in C(x), and a projected gradient step leaves it there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import Batch, per_sample
from ..errors import InputError
from ..modes import attack_mode, same_buffers
from ..problem import BilevelProblem, LowerProblem, attack_mode_of, base_at, objective_gradient
from ..solution import Solution

__all__ = ["activity_margin", "kkt_residual", "lam_of_rows", "outside"]


def activity_margin(
    problem: BilevelProblem,
    model: nn.Module,
    batch: Batch,
    anchor: Tensor,
    generator: torch.Generator | None = None,
) -> float:
    """The least slack of an inactive constraint or multiplier of an active one, over the batch.

    At 0 strict complementarity fails and dδ*/dθ does not exist. Property tests should stay away from it.
    """
    lower = problem.lower
    with same_buffers(model):
        solution = lower.solve(model, batch, anchor, generator, differentiable=True)
    if solution.gradient is None:
        raise InputError(f"{type(lower).__name__} finds a δ* without a derivative; it has no activity margin")
    base = base_at(lower, model, solution.batch).detach()
    return lower.constraint.strict_complementarity(solution.delta, base, solution.gradient.detach()).min().item()


def outside(lower: LowerProblem, model: nn.Module, solution: Solution) -> Tensor:
    """How far δ* is from its constraint, max |δ* − P_C(δ*)| per row, ``[B]``; 0 where there is no constraint."""
    delta = solution.delta
    constraint = getattr(lower, "constraint", None)
    if constraint is None:
        return torch.zeros(len(delta), dtype=delta.dtype, device=delta.device)
    with same_buffers(model):
        base = base_at(lower, model, solution.batch)
    with torch.no_grad():
        gap: Tensor = (delta - constraint.project(delta, base)).abs().flatten(1).amax(1)
    return gap


def lam_of_rows(lam: Tensor | float, like: Tensor) -> Tensor:
    """λ for each row of ``like``, ``[B]``."""
    return torch.as_tensor(lam, dtype=like.dtype, device=like.device).expand(len(like))


def kkt_residual(lower: LowerProblem, model: nn.Module, solution: Solution) -> Tensor:
    """max |δ* − P_C(δ* − s ∇_δ g(θ, δ*; z))| per row, ``[B]``, with s = 1/λ (1 where λ is 0).

    0 for any s > 0 at a minimiser of a convex g over C, which is the KKT conditions in one line. ∇_δ g is autograd's,
    of ``lower.objective``.
    """
    with attack_mode(model, attack_mode_of(lower)):
        slope = objective_gradient(lower, model, solution.batch, solution.delta, solution.anchor).detach()
        with torch.no_grad():
            base = lower.base(model, solution.batch)
            lam = lam_of_rows(solution.lam, slope)
            size = per_sample(torch.where(lam > 0, 1 / lam.clamp(min=1e-30), 1.0), slope)
            moved = lower.constraint.project(solution.delta - size * slope, base)
            return (solution.delta - moved).abs().flatten(1).amax(1)
