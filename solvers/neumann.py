"""Truncated Neumann series: the derivative of the last few steps of projected gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bilevel_at import shares
from bilevel_at.batch import per_sample
from bilevel_at.constraints import ActiveSet
from bilevel_at.errors import one_of, positive, whole_number
from bilevel_at.kkt import CrossAt, Curvature, KKTSolver, curved_part
from bilevel_at.modes import attack_mode
from bilevel_at.problem import BilevelProblem, attack_mode_of
from bilevel_at.solution import Solution

from .linear import CurvatureOperator

__all__ = ["Neumann"]

POWER_STEPS = 10
"""Hessian-vector products with which "auto" measures ‖H‖."""


@dataclass
class Neumann(KKTSolver):
    """The inverse of the KKT system as a series that is cut off after ``terms`` terms.

        w = α Σ_{k<K} (c T(I − αH))^k c T v        H = ∇²_δδ g + damping · I,  c = 1 / (1 + αμ)

    c is 1 but on a curved boundary with multiplier μ. cT is the derivative of the projection at δ* − α∇_δ g, so w is
    exactly what differentiating the last K steps δ ← P_C(δ − α∇_δ g(θ, δ)) at the fixed point δ* gives: K = 1 is
    one-step differentiation (Bolte, Pauwels and Vaiter, 2023), any K truncated unrolling (Shaban et al., 2019). For
    α < 2/‖H‖ and a positive definite H it tends to :class:`FullKKT` geometrically, by the factor max |1 − αλ_i(THT)|
    (on flat constraints) a term. Where H is not positive definite the sum is still that derivative.

    Args:
        terms: K, the number of terms, at least 1; each but the first costs a Hessian-vector product, three passes (none
            where g is linearised, for which one term with α = 1/λ is exact).
        alpha: α, the step; "auto" is 1/(λ + damping) where the Hessian is λI, and elsewhere 1/‖H‖ per sample, as ten
            power iterations from T v measure it.
        curvature: as for :class:`FullKKT`.
        damping: added to the Hessian's diagonal.
        ig_weight: multiplies the implicit term.
        cross_at: as for :class:`HessianFreeKKT`.

    Raises:
        InputError: where ``terms`` is below 1, or α not positive.
        CurvatureError: where α is "auto", the Hessian λI, and λ + damping 0.
    """

    terms: int = 10
    alpha: float | Literal["auto"] = "auto"
    curvature: Curvature = "lower"
    damping: float = 0.0
    ig_weight: float = 1.0
    cross_at: CrossAt = "anchor"

    def __post_init__(self) -> None:
        self._check()
        whole_number("terms", self.terms, 1)
        if self.alpha != "auto":
            positive("alpha", self.alpha)
        one_of("curvature", self.curvature, ("lower", "attack"))

    def adjoint(self, problem: BilevelProblem, model: nn.Module, solution: Solution, v: Tensor) -> Tensor:
        """w = α Σ_{k<K} (c T(I − αH))^k c T v, ``[B, ...]``."""
        lower = problem.lower
        active = self.active(lower, model, solution)
        part, lam = curved_part(problem, model, solution, self.curvature)
        diagonal = self.proximal(replace(solution, lam=lam))
        if part is None or (self.terms == 1 and self.alpha != "auto"):  # the one term has no H in it
            if self.alpha == "auto":
                self.refuse_flat(lower, lam, diagonal)
            alpha = 1 / diagonal if self.alpha == "auto" else torch.full_like(diagonal, self.alpha)
            return self._series(lambda p: active.tangent(per_sample(diagonal, p) * p), alpha, active, v)
        with attack_mode(model, attack_mode_of(lower)):
            operator = CurvatureOperator(part, solution, diagonal, active, model)
            if self.alpha == "auto":
                alpha = 1 / _norm(operator, active.tangent(v), operator.coupled)
            else:
                alpha = torch.full_like(diagonal, self.alpha)
            return self._series(operator, alpha, active, v)

    def _series(self, operator: Callable[[Tensor], Tensor], alpha: Tensor, active: ActiveSet, v: Tensor) -> Tensor:
        shrink = torch.ones_like(alpha) if active.curvature is None else 1 / (1 + alpha * active.curvature)
        each = per_sample(shrink, v)
        term = each * active.tangent(v)
        total = term
        for _ in range(self.terms - 1):
            term = each * (term - per_sample(alpha, v) * operator(term))
            total = total + term
        return per_sample(alpha, v) * total


def _norm(operator: Callable[[Tensor], Tensor], start: Tensor, coupled: bool) -> Tensor:
    """‖H‖ on the directions that the series goes through, ``[B]``; of the whole batch where it is one system."""

    def length(p: Tensor) -> Tensor:
        if not coupled:
            return p.flatten(1).norm(dim=1)
        own = p.norm()  # of a batch that processes share, the root of all their squares
        return (own if shares.current() is None else shares.total(own.square()).sqrt()).expand(len(p))

    def to_unit(p: Tensor) -> Tensor:
        size = length(p)
        return p / per_sample(torch.where(size > 0, size, 1), p)

    p, norm = to_unit(start), torch.zeros(len(start), dtype=start.dtype, device=start.device)
    for _ in range(POWER_STEPS):
        q = operator(p)
        norm = torch.maximum(norm, length(q))
        p = to_unit(q)
    return torch.where(norm > 0, norm, 1)
