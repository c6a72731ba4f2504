"""The adjoint as a difference of projections, for constraints that know no more of themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bilevel_at.batch import per_sample
from bilevel_at.constraints import Constraint
from bilevel_at.kkt import CrossAt, KKTSolver
from bilevel_at.problem import BilevelProblem, base_at
from bilevel_at.solution import Solution

__all__ = ["ProjectionAdjoint"]


@dataclass
class ProjectionAdjoint(KKTSolver):
    """The implicit gradient with ∇²_δδ g = λI, from projections instead of an active set.

        w = (P_C(u + s v̂) − P_C(u − s v̂)) · ‖v‖ / (2 s λ)        u = δ* − ∇_δ g / λ,  v̂ = v / ‖v‖

    per sample: as δ* = P_C(u), this is P_C's derivative at u, which is symmetric, applied to v / λ. Equals
    :class:`HessianFreeKKT` where that has an active set, and is exact for the same problems (Taylor-linearised ones).
    It needs ``project`` only, for any closed convex set. Where δ* is about to enter or leave a constraint, P_C has no
    derivative, and this is a mean of its one-sided ones. Where δ* is no minimiser of g (a few steps of an optimiser),
    P_C(u) is another point, and so is the derivative. ``project`` is also called with a part of the batch's rows.

    The difference is extrapolated from s and 2s, with s = eps^⅕ ‖u‖ at first, where rounding and curvature matter
    equally. For samples in whose reach P_C has a kink (the second differences at s and 2s do not fit together) s is
    divided by 4, down to eps^½ ‖u‖, and the s counts at which they fit best.

    Args:
        ig_weight: multiplies the implicit term; 1 is the exact hypergradient.
        damping: added to λ; needed where g has no proximal term (λ = 0).
        cross_at: as for :class:`HessianFreeKKT`.

    Raises:
        CurvatureError: where λ + damping is 0.
    """

    ig_weight: float = 1.0
    damping: float = 0.0
    cross_at: CrossAt = "anchor"

    def __post_init__(self) -> None:
        self._check()

    def adjoint(self, problem: BilevelProblem, model: nn.Module, solution: Solution, v: Tensor) -> Tensor:
        """w = (P_C(u + s v̂) − P_C(u − s v̂)) ‖v‖ / (2 s (λ + damping)), ``[B, ...]``."""
        lower, gradient = problem.lower, solution.gradient
        assert gradient is not None  # a solver with an implicit term is not called without it
        lam = self.proximal(solution)
        self.refuse_flat(lower, solution.lam, lam)
        with torch.no_grad():
            base = base_at(lower, model, solution.batch).detach()
            u = solution.delta - gradient.detach() / per_sample(lam, gradient)
            if u.dtype in (torch.float16, torch.bfloat16):  # half precisions have no digits to take differences of
                u, base = u.float(), base.float()
            length = _length(v.to(u))
            unit = v.to(u) / per_sample(torch.where(length > 0, length, 1), u)
            slope = _derivative(lower.constraint, u, base, unit)
            w: Tensor = slope * per_sample(length / lam.to(u), u)
            return w.to(v)


def _derivative(constraint: Constraint, u: Tensor, base: Tensor, unit: Tensor) -> Tensor:
    """The derivative of P_C at ``u`` along ``unit``, ``[B, ...]``, by central differences."""
    eps = torch.finfo(u.dtype).eps
    centre = constraint.project(u, base)
    # Projections look at x + δ too, whose rounding a tiny u must not drown in.
    size = _length(u) + eps ** (1 / 3) * (1 + _length(base))
    out, best = torch.zeros_like(u), torch.full_like(size, torch.inf)
    relative = eps ** (1 / 5)
    rows = torch.arange(len(u), device=u.device)
    while True:
        point, x, along = u[rows], base[rows], per_sample(relative * size[rows], u) * unit[rows]
        central, second = [], []
        for times in (1, 2):
            forward = constraint.project(point + times * along, x) - centre[rows]
            backward = centre[rows] - constraint.project(point - times * along, x)
            central.append((forward + backward) / times)
            second.append((forward - backward) / times)
        # Along a smooth boundary the second grows with s, and what is left of the first is of fourth order.
        misfit = _length(second[1] - 2 * second[0]) / _length(along).clamp(min=torch.finfo(u.dtype).tiny)
        slope = (4 * central[0] - central[1]) / 6 / per_sample(relative * size[rows], u)
        better = misfit < best[rows]
        out[rows[better]], best[rows[better]] = slope[better], misfit[better]
        rows = rows[misfit > eps**0.5]
        relative = relative / 4
        if len(rows) == 0 or relative < eps**0.5:
            return out


def _length(v: Tensor) -> Tensor:
    """‖v_i‖₂, ``[B]``."""
    return v.flatten(1).norm(dim=1)
