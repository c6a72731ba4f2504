"""Full KKT: the adjoint with the true Hessian, by Cholesky or by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bilevel_at.constraints import ActiveSet
from bilevel_at.errors import BilevelError, CurvatureError, InputError, name_samples, one_of, positive, whole_number
from bilevel_at.kkt import CrossAt, Curvature, KKTSolver, curved_part, scalar_adjoint, with_multiplier
from bilevel_at.lockstep import places
from bilevel_at.modes import attack_mode, full_precision
from bilevel_at.problem import BilevelProblem, attack_mode_of
from bilevel_at.solution import Solution

from .linear import CurvatureOperator, conjugate_gradients, dense_hessian

__all__ = ["FullKKT"]


@dataclass
class FullKKT(KKTSolver):
    """The implicit gradient of the KKT system: T(H + (μ + damping)I)T w = T v (Fast-BAT paper, Proposition 1).

    Exact for any smooth g that is strongly convex on the free directions T, on boxes, ℓ2 balls and polyhedra.

    Args:
        method: "dense" forms H per sample with torch.func and factorises it; "cg" needs only Hessian-vector products;
            "auto" is cg, and where that meets non-positive curvature or does not converge, dense decides, up to
            ``dense_limit`` values per input and where samples share nothing. Where they share something (batch
            statistics), cg solves the batch as one system.
        curvature: "lower" is the Hessian of the g that was solved (λI where that is linearised); "attack" is
            ∇²ℓ_atk + λI, the paper's Hessian-aware Fast-BAT.
        damping: added to the Hessian's diagonal.
        ig_weight: as for :class:`HessianFreeKKT`.
        cross_at: as for :class:`HessianFreeKKT`.
        tol: of cg, relative to ‖v‖ per sample; None is eps^¾ of the dtype.
        max_iter: of cg; None is 10 d.
        dense_limit: the largest d for which "auto" forms H, which takes B·d² numbers.

    Raises:
        CurvatureError: where the matrix is not positive definite on T, naming the samples (cg sees that only in the
            directions it goes through).
        ConvergenceError: where cg does not reach ``tol``.
        InputError: where "dense" meets samples that share something.
    """

    method: Literal["auto", "dense", "cg"] = "auto"
    curvature: Curvature = "lower"
    damping: float = 0.0
    ig_weight: float = 1.0
    cross_at: CrossAt = "anchor"
    tol: float | None = None
    max_iter: int | None = None
    dense_limit: int = 128

    def __post_init__(self) -> None:
        self._check()
        one_of("method", self.method, ("auto", "dense", "cg"))
        one_of("curvature", self.curvature, ("lower", "attack"))
        if self.tol is not None:
            positive("tol", self.tol)
        if self.max_iter is not None:
            whole_number("max_iter", self.max_iter, 1)
        whole_number("dense_limit", self.dense_limit, 0)

    def adjoint(self, problem: BilevelProblem, model: nn.Module, solution: Solution, v: Tensor) -> Tensor:
        """w ``[B, ...]`` with T(H + (μ + damping)I)T w = T v."""
        lower = problem.lower
        active = self.active(lower, model, solution)
        part, lam = curved_part(problem, model, solution, self.curvature)
        diagonal = with_multiplier(self.proximal(replace(solution, lam=lam)), active)
        if part is None:
            self._refuse(diagonal <= 0)
            return scalar_adjoint(diagonal, active, v)
        with attack_mode(model, attack_mode_of(lower)):
            operator = CurvatureOperator(part, solution, diagonal, active, model)
            if self.method == "dense":
                if operator.coupled:
                    raise InputError(
                        'method="dense" needs samples that share nothing; here one sample\'s loss depends on '
                        "another's perturbation (batch normalisation in train mode, a mean over the batch), so that a "
                        'per-sample Hessian does not exist; use method="cg", or mode="eval" in the lower problem'
                    )
                return self._cholesky(dense_hessian(part, solution), diagonal, active, v)
            try:
                return conjugate_gradients(
                    operator, active.tangent(v), v, tol=self.tol, max_iter=self.max_iter, coupled=operator.coupled
                )
            except BilevelError as doubt:
                if self.method == "cg" or operator.coupled or v[0].numel() > self.dense_limit:
                    raise
                try:
                    hessian = dense_hessian(part, solution)
                except InputError:  # torch.func cannot take this network
                    raise doubt from None
            return self._cholesky(hessian, diagonal, active, v)

    def _cholesky(self, hessian: Tensor, diagonal: Tensor, active: ActiveSet, v: Tensor) -> Tensor:
        exact = torch.float64 if v.dtype == torch.float64 else torch.float32  # half precisions are not factorised
        matrix = hessian.to(exact)  # and changed in place: each of its copies is B·d² numbers
        matrix.diagonal(dim1=1, dim2=2).add_(diagonal.to(exact)[:, None])
        right = active.tangent(v).flatten(1)[..., None].to(exact)
        with full_precision(v.device):
            # Positive definite exactly where the Hessian with its diagonal is so on the range of T.
            matrix = active.restricted(matrix)
            factor, failed = torch.linalg.cholesky_ex((matrix + matrix.mT).div_(2))
            self._refuse(failed > 0)
            return active.tangent(torch.cholesky_solve(right, factor).reshape(v.shape).to(v))

    @staticmethod
    def _refuse(bad: Tensor) -> None:
        samples = places(bad.nonzero().flatten().tolist(), len(bad))
        if samples:
            raise CurvatureError(
                f"the Hessian is not positive definite on the free directions of {name_samples(samples)}; "
                "raise λ or damping, or use HessianFreeKKT",
                samples,
            )
