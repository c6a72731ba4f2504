"""Gauss-Newton KKT: the Hessian of the cross-entropy from one backward pass a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bilevel_at.batch_statistics import couples
from bilevel_at.constraints import ActiveSet
from bilevel_at.errors import ConvergenceError, CurvatureError, InputError, at_least, name_samples, one_of
from bilevel_at.kkt import CrossAt, KKTSolver, with_multiplier
from bilevel_at.lockstep import anywhere, places
from bilevel_at.losses import CrossEntropy, Loss, as_loss, minus
from bilevel_at.modes import attack_mode, full_precision
from bilevel_at.problem import BilevelProblem, LowerProblem, attack_mode_of
from bilevel_at.solution import Solution

from .linear import coupled_samples

__all__ = ["GaussNewtonKKT"]


class _Curvature(NamedTuple):
    """The matrix T(σUUᵀ + c I)T of each sample.

    sign: σ, −1 where the attack loss is minus the cross-entropy.
    factor: U = T Jᵀ(diag √p − p√pᵀ), ``[B, d, K]``.
    values, vectors: eigenvalues (rising) and eigenvectors of UᵀU, ``[B, K]`` and ``[B, K, K]``.
    constant: c = λ + μ, ``[B]``, without damping.
    rank: the number of free directions, ``[B]``.
    """

    sign: int
    factor: Tensor
    values: Tensor
    vectors: Tensor
    constant: Tensor
    rank: Tensor

    def smallest(self) -> Tensor:
        """λ_min on the range of T, ``[B]``; infinite where that is {0}."""
        if self.sign < 0:
            least = self.constant - self.values[:, -1]
        else:
            # UUᵀ has rank(T) eigenvalues there: the largest of UᵀU, and zeros where K is smaller.
            falling = self.values.flip(1)
            place = (self.rank - 1).clamp(min=0)
            beyond = place >= falling.shape[1]
            own = falling.gather(1, place.clamp(max=falling.shape[1] - 1)[:, None]).squeeze(1)
            least = self.constant + torch.where(beyond, 0, own)
        return torch.where(self.rank > 0, least, torch.inf)


@dataclass
class GaussNewtonKKT(KKTSolver):
    """The Hessian-aware implicit gradient, T(∇²ℓ_atk + (λ + μ + damping)I)T w = T v, for ℓ_atk = ± cross-entropy.

        ∇²ℓ_CE ≈ Jᵀ S J        J = ∂ logits/∂δ,   S = diag(p) − ppᵀ = L Lᵀ,   L = diag √p − p√pᵀ

    which is exact on piecewise-linear networks (ReLU, max-pooling, batch normalisation in eval mode), and equals
    ``FullKKT(curvature="attack")`` there; elsewhere it leaves out Σ_k (p − t)_k ∇² logit_k. Its rank is at most
    K − 1, so with U = T JᵀL, σ = ±1 and c = λ + μ + damping the Woodbury identity solves the system exactly,

        w = (T v − σ U (c I + σ UᵀU)⁻¹ UᵀT v) / c

    and the eigenvalues of UᵀU give the matrix's least one, so that refusal and damping are exact. Cost: one forward
    pass and K backward passes to the input. Label smoothing does not change the Hessian.

    Args:
        damping: added to the Hessian's diagonal. "auto" adds, sample by sample, the least that brings the least
            eigenvalue to ``margin`` times the largest of λ + μ and ‖JᵀSJ‖, and nothing where it is above.
        ig_weight: multiplies the implicit term.
        cross_at: as for :class:`HessianFreeKKT`.
        margin: for damping="auto", above 0 and at most 1: no direction of v is magnified by more than its inverse,
            against the steepest.

    Raises:
        InputError: where the attack loss is not ± :class:`~bilevel_at.CrossEntropy`, or samples share something.
        CurvatureError: where the matrix is not positive definite on T, naming the samples and the least eigenvalue.
        ConvergenceError: where the attack loss is not a number.
    """

    damping: float | Literal["auto"] = 0.0  # type: ignore[assignment]  # the other solvers have numbers only
    ig_weight: float = 1.0
    cross_at: CrossAt = "anchor"
    margin: float = 0.1

    def __post_init__(self) -> None:
        at_least("ig_weight", self.ig_weight)
        if self.damping != "auto":
            at_least("damping", self.damping)
        one_of("cross_at", self.cross_at, ("anchor", "solution", "merged"))
        if not 0 < at_least("margin", self.margin) <= 1:
            raise InputError(f"margin is {self.margin:g}; it must be above 0 and at most 1")

    def smallest_eigenvalue(self, problem: BilevelProblem, model: nn.Module, solution: Solution) -> Tensor:
        """λ_min of T(∇²ℓ_atk + (λ + μ)I)T on the range of T, ``[B]``, without damping; infinite where nothing is free.

        Args:
            problem, model: the two players.
            solution: of ``problem.lower.solve(..., differentiable=True)``, whose gradient gives μ.
        """
        active = self.active(problem.lower, model, solution)
        return self._curvature(problem.lower, model, solution, active).smallest()

    def adjoint(self, problem: BilevelProblem, model: nn.Module, solution: Solution, v: Tensor) -> Tensor:
        """w ``[B, ...]`` by the Woodbury identity."""
        active = self.active(problem.lower, model, solution)
        curved = self._curvature(problem.lower, model, solution, active)
        damping = self._damping(curved)
        self._refuse(curved.smallest(), damping)
        c = (curved.constant + damping)[:, None]
        right = active.tangent(v).flatten(1).to(c)
        with full_precision(v.device):
            # In the eigenvectors Q of UᵀU the small system is diagonal.
            inner = (curved.vectors.mT @ (curved.factor.mT @ right[..., None])).squeeze(-1)
            weights = inner / (c + curved.sign * curved.values)
            # Where c is 0 and nothing is refused, U spans all that is free: T v = U (UᵀU)⁺ UᵀT v, and w likewise.
            flat = c == 0
            within = torch.where(curved.values > 0, weights / curved.values, 0)
            combined = torch.where(flat, within, -curved.sign * weights / c)
            along = (curved.factor @ (curved.vectors @ combined[..., None])).squeeze(-1)
            return torch.where(flat, along, along + right / c).reshape(v.shape).to(v)

    def _damping(self, curved: _Curvature) -> Tensor:
        if self.damping != "auto":
            return torch.full_like(curved.constant, self.damping)
        goal = self.margin * torch.maximum(curved.constant, curved.values[:, -1])
        return (goal - curved.smallest()).clamp(min=0)

    def _curvature(self, lower: LowerProblem, model: nn.Module, solution: Solution, active: ActiveSet) -> _Curvature:
        sign, loss = _cross_entropy_of(lower)
        delta = solution.delta.detach().requires_grad_()
        with torch.enable_grad(), attack_mode(model, attack_mode_of(lower)):
            logits = loss.forward(model, solution.batch, delta)
            values = loss.value(logits, solution.batch)
            lost = values.isnan().nonzero().flatten().tolist()  # whose derivatives are no numbers either, so not 0
            coupled = couples(model) or anywhere(not lost and coupled_samples(values, delta))
            if len(delta) != len(logits) or coupled:
                raise InputError(
                    "GaussNewtonKKT needs samples that share nothing; here one sample's loss depends on another's "
                    "perturbation (batch normalisation in train mode, a mean over the batch, one δ for all); use "
                    'FullKKT(method="cg", curvature="attack"), or mode="eval" in the lower problem'
                )
            if lost:
                lost = places(lost, len(values))
                raise ConvergenceError(f"the attack loss is not a number on {name_samples(lost)}", lost)
            rows = [
                active.tangent(torch.autograd.grad(logits[:, k].sum(), delta, retain_graph=True)[0]).flatten(1)
                for k in range(logits.shape[1])
            ]
        exact = torch.float64 if delta.dtype == torch.float64 else torch.float32  # half precisions have no solvers
        with full_precision(delta.device):
            p = logits.detach().to(exact).softmax(1)
            root = p.sqrt()
            half = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]
            factor = torch.stack(rows, 2).to(exact) @ half
            eigenvalues, eigenvectors = torch.linalg.eigh(factor.mT @ factor)
        cut = len(rows) * torch.finfo(exact).eps * eigenvalues[:, -1:]
        eigenvalues = torch.where(eigenvalues > cut, eigenvalues, 0)  # U has a rank of K − 1 at most, not K
        free = active.free.flatten(1).sum(1)
        if active.normals is not None:
            free = free - active.normals.square().sum((1, 2)).round().to(free)
        constant = torch.zeros(len(delta), dtype=exact, device=delta.device) + solution.lam
        constant = with_multiplier(constant, active)
        return _Curvature(sign, factor, eigenvalues, eigenvectors, constant, free)

    @staticmethod
    def _refuse(least: Tensor, damping: Tensor) -> None:
        samples = places((least + damping <= 0).nonzero().flatten().tolist(), len(least))
        if samples:
            raise CurvatureError(
                f"the Hessian is not positive definite on the free directions of {name_samples(samples)} (its least "
                f'eigenvalue is {(least + damping).min().item():.3g}); raise λ or damping (or damping="auto"), or use '
                "HessianFreeKKT",
                samples,
            )


def _cross_entropy_of(lower: LowerProblem) -> tuple[int, Loss]:
    """(σ, the cross-entropy), where the attack loss is σ times it."""
    stated = getattr(lower, "attack_loss", None)
    sign, loss = 1, None if stated is None else as_loss(stated)
    while isinstance(loss, minus):
        sign, loss = -sign, loss.loss
    if not isinstance(loss, CrossEntropy) or type(loss).value is not CrossEntropy.value:
        shown = "there is none" if stated is None else f"here it is {as_loss(stated)!r}"
        raise InputError(
            f"GaussNewtonKKT needs an attack loss that is plus or minus ba.CrossEntropy; {shown}; use FullKKT"
        )
    return sign, loss
