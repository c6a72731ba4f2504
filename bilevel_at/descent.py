"""Projected gradient descent on a batch of independent convex problems, each with its own step size.

The step adapts to the local curvature without line search or further gradients: Malitsky and Mishchenko, "Adaptive
proximal gradient method for convex optimization" (2024), Algorithm 1 with their improved constants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import lockstep, shares
from .batch import per_sample
from .errors import ConvergenceError, name_samples

__all__ = ["projected_gradient"]

DONE, GOING, LOST = 0, 1, 2
"""What a step leaves: every sample within tolerance; some not; some not a number."""


def projected_gradient(
    objective: Callable[[Tensor], Tensor],
    start: Tensor,
    project: Callable[[Tensor], Tensor],
    tol: float | None = None,
    max_iter: int = 10_000,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Minimise ``objective(δ) -> [B]`` over the set that ``project`` projects onto, from ``start``.

    Returns (δ*, residual ``[B]``), where the residual bounds max |δ − P(δ − scale·∇g)|: at 0, δ is a KKT point, and for
    a g of strong convexity λ = 1/scale and smoothness L the distance to the minimiser is at most (1 + L/λ) times it in
    ‖·‖₂. ``tol=None`` is eps^¾ of the dtype. Processes that share a batch stop at the same step, when all are done:
    samples that have statistics in common wait for each other, and N processes make the steps that one makes.

    Raises :class:`ConvergenceError`, naming the samples, where a residual is above ``tol`` after ``max_iter`` steps.
    """
    if tol is None:
        tol = torch.finfo(start.dtype).eps ** 0.75

    def gradient(point: Tensor) -> Tensor:
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            (out,) = torch.autograd.grad(objective(point).sum(), point)
        return out

    def length(v: Tensor) -> Tensor:
        return v.flatten(1).norm(dim=1)

    x = start.detach()
    g = gradient(x)
    step = torch.full((len(x),), 1e-3, dtype=x.dtype, device=x.device)
    ratio = torch.full_like(step, torch.inf)  # the first steps may grow as fast as the curvature allows
    residual = torch.full_like(step, torch.inf)
    share = shares.current()
    counts = share is None or not share.idle
    for _ in range(max_iter):
        moved = project(x - per_sample(step, x) * g).detach()
        # |δ − P(δ − s∇g)| grows with s, but no faster than s: this bounds its value at s = scale.
        residual = (moved - x).abs().flatten(1).amax(1) * (scale / step).clamp(min=1)
        level = DONE
        if counts and not bool((residual <= tol).all()):
            level = LOST if bool(residual.isnan().any()) else GOING
        level = lockstep.worst(level)
        if level == DONE:
            return moved, residual
        if level == LOST:
            break
        g_moved = gradient(moved)
        distance = length(moved - x)
        curvature = length(g_moved - g) / distance.clamp(min=1e-38)
        growth = step * torch.sqrt(2 / 3 + ratio)
        excess = (2 * (step * curvature).square() - 1).clamp(min=0).sqrt()
        limited = torch.where(excess > 0, step / excess, torch.inf)
        new = torch.minimum(growth, limited)
        # A sample at rest measures no curvature: its step stays.
        new = torch.where(torch.isfinite(new) & (distance > 0), new, step)
        ratio = new / step
        step, x, g = new, moved, g_moved
    lost = lockstep.everyones(torch.nonzero(residual.isnan()).flatten().tolist(), len(x))
    if lost:
        raise ConvergenceError(
            f"the lower level's objective or its gradient is not a number on {name_samples(lost)}", lost
        )
    late = lockstep.everyones(torch.nonzero(residual > tol).flatten().tolist(), len(x))
    most = lockstep.largest(residual.max() if counts else residual.new_zeros(())).item()
    raise ConvergenceError(
        f"the lower level did not reach tol={tol:g} in max_iter={max_iter} steps on {name_samples(late)} "
        f"(largest residual {most:.2g}); raise lam, tol or max_iter",
        late,
    )
