"""Hessian-free KKT: w = T v / (λ + μ), the Hessian of the attacker's loss taken as zero."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bilevel_at.errors import InputError
from bilevel_at.kkt import CrossAt, KKTSolver, scalar_adjoint, with_multiplier
from bilevel_at.problem import BilevelProblem
from bilevel_at.solution import Solution

__all__ = ["HessianFreeKKT"]


@dataclass
class HessianFreeKKT(KKTSolver):
    """The implicit gradient with ∇²_δδ g = λI: w = 1_F ⊙ v / λ on a box (Fast-BAT paper, Corollary 1).

    Exact for Taylor-linearised problems, whose Hessian is λI; elsewhere an approximation that costs nothing more.

    Args:
        ig_weight: multiplies the implicit term (the paper's α₂/α₁); 1 is the exact hypergradient. Published Fast-BAT
            uses 0.1·λ.
        damping: added to λ; needed where g has no proximal term (λ = 0).
        cross_at: "anchor" differentiates the g that was solved; "solution" takes the cross derivative at δ*, as the
            paper's equation 13 is written; "merged" approximates that with first-order passes alone, exact to first
            order in ig_weight/λ (:class:`~bilevel_at.KKTSolver` has its error, and what it needs).

    Raises:
        CurvatureError: where λ + damping is 0.
    """

    ig_weight: float = 1.0
    damping: float = 0.0
    cross_at: CrossAt = "anchor"

    def __post_init__(self) -> None:
        self._check()

    def compile(self, backend: str = "inductor") -> None:
        if self.cross_at == "merged":
            raise InputError(
                'no single graph can be compiled with cross_at="merged", whose two passes make the same random draws: '
                'leave out --compile (or compile()), or take cross_at="anchor" or "solution"'
            )
        super().compile(backend)

    def adjoint(self, problem: BilevelProblem, model: nn.Module, solution: Solution, v: Tensor) -> Tensor:
        """w = T v / (λ + μ + damping), ``[B, ...]``."""
        active = self.active(problem.lower, model, solution)
        diagonal = with_multiplier(self.proximal(solution), active)
        self.refuse_flat(problem.lower, solution.lam, diagonal)
        return scalar_adjoint(diagonal, active, v)
