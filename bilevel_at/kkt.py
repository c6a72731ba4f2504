"""What the KKT solvers share: λ, μ and damping, the curvature, and where the cross derivative is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from .batch import on_host, per_sample
from .constraints import ActiveSet
from .directions import direction_of, taylor
from .draws import Draws
from .errors import CurvatureError, InputError, at_least, name_samples, one_of
from .lockstep import places, raised_alike, rows_of_all
from .losses import AnyLoss, CrossEntropy, as_loss, minus
from .lower import Linearized, Proximal
from .modes import attack_mode, same_buffers
from .problem import (
    BilevelProblem,
    CurvedPart,
    LowerProblem,
    UpperProblem,
    attack_mode_of,
    base_at,
    objective_gradient,
)
from .solution import Solution
from .solver import Attacked, Solver, Terms

__all__ = ["CrossAt", "Curvature", "KKTSolver", "curved_part", "scalar_adjoint", "with_multiplier"]

CrossAt = Literal["anchor", "solution", "merged"]
Curvature = Literal["lower", "attack"]


class KKTSolver(Solver):
    """A solver with an adjoint of the KKT system T(H + (μ + damping)I)T w = T v, or an approximation of it.

    Fields of a subclass: ``ig_weight``, ``damping``, ``cross_at``.

    cross_at: where the cross derivative ∇_θ ∇_δ g is taken.

        - "anchor": that of the g that was solved, which for a linearised g is taken at z.
        - "solution": at δ*, as the Fast-BAT paper's equation 13 is written.
        - "merged": at δ*, and together with ∇_θ f in one pass, where ℓ_atk = −f. As ∇_θ f(θ, δ) is differentiated in δ
          along u = ig_weight · B · w, the two terms of "solution" are the beginning of its Taylor series there, and

              ∇_θ mean f(θ, δ* + u) = ∇_θ mean f(θ, δ*) + ∇_θ ⟨∇_δ mean f, u⟩ + O(‖u‖²)

          so that no double backward is needed. Its error against "solution" is ½ ∇_θ ∂²f[u, u] to leading order: it
          falls as ig_weight² on smooth networks; on those with kinks a unit that changes its side between δ* and δ* + u
          adds a jump, and the fewer do, the shorter u. The two terms are not known apart: ``direct`` has their sum, and
          ``implicit`` is empty. A step of Fast-BAT costs 9 passes instead of 13.
    """

    damping: float = 0.0
    cross_at: CrossAt = "anchor"

    @property
    def first_order(self) -> bool:  # type: ignore[override]  # elsewhere an attribute
        """Whether ∇_δ g needs no graph."""
        return self.cross_at == "merged"

    def _check(self) -> None:
        for name in ("ig_weight", "damping"):
            at_least(name, getattr(self, name))
        one_of("cross_at", self.cross_at, ("anchor", "solution", "merged"))

    def lower_gradient(self, lower: LowerProblem, model: nn.Module, solution: Solution) -> Tensor | None:
        """∇_δ g at δ*; with ``cross_at="solution"``, of the g that is linearised (or anchored) at δ* instead of z."""
        gradient = solution.gradient
        if self.cross_at != "solution" or gradient is None or not gradient.requires_grad:
            return gradient
        with attack_mode(model, attack_mode_of(lower)):
            moved = objective_gradient(lower, model, solution.batch, solution.delta, solution.delta)
        # The value stays ∇_δ g at δ*, which active sets look at; only its derivative in θ is the other one.
        return gradient.detach() + moved - moved.detach()

    def differentiate(self, attacked: Attacked) -> Terms:
        """The direct and the implicit term; with ``cross_at="merged"`` their sum, from two passes at and near δ*."""
        if self.cross_at != "merged" or not attacked.moves:
            return super().differentiate(attacked)
        _check_merged(attacked)
        named, solution, gradient = attacked.parameters, attacked.solution, attacked.gradient
        draws = Draws(attacked.generator, solution.delta.device)
        delta = solution.delta.detach().requires_grad_()
        losses = attacked.losses(delta, attacked.generator)
        (v,) = torch.autograd.grad(attacked.total(losses), delta)
        value = None if gradient is None else gradient.detach()
        at = replace(solution, gradient=value)
        w = raised_alike(attacked.model, lambda: self.adjoint(attacked.problem, attacked.model, at, v))
        # g is the sum over losses, f their mean over the whole batch; a coupled loss is one number.
        near = solution.delta + (self.ig_weight * (rows_of_all(len(losses)) if losses.ndim else 1) / attacked.scale) * w
        with draws.again() as generator, same_buffers(attacked.model):
            total = attacked.total(attacked.losses(near, generator))
            both = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        return Terms(losses, dict(zip(named, both, strict=True)), {}, v)

    @staticmethod
    def active(lower: LowerProblem, model: nn.Module, solution: Solution) -> ActiveSet:
        """The constraints that bind at δ*."""
        base = base_at(lower, model, solution.batch)
        gradient = None if solution.gradient is None else solution.gradient.detach()
        return lower.constraint.active(solution.delta, base, gradient)

    def proximal(self, solution: Solution) -> Tensor:
        """λ + damping for each row of δ*."""
        delta = solution.delta
        return torch.zeros(len(delta), dtype=delta.dtype, device=delta.device) + solution.lam + self.damping

    def refuse_flat(self, lower: LowerProblem, lam: Tensor | float, diagonal: Tensor) -> None:
        """Raise :class:`CurvatureError` where ``diagonal``, which is to stand for the Hessian, is 0.

        The diagonal is looked at only where λ, as a number, leaves it open (μ is never negative), or is on a CPU.
        """
        leave = not on_host(lam) if isinstance(lam, Tensor) else lam + self.damping > 0
        if leave:
            return
        flat = places((diagonal <= 0).nonzero().flatten().tolist(), len(diagonal))
        if flat:
            raise CurvatureError(
                f"{type(lower).__name__} has no proximal term (λ = 0) on {name_samples(flat)}, so λI has no inverse; "
                f"give {type(self).__name__} a damping above 0, or use ZeroIG",
                flat,
            )


def curved_part(
    problem: BilevelProblem, model: nn.Module, solution: Solution, curvature: Curvature
) -> tuple[CurvedPart | None, Tensor | float]:
    """(ℓ, λ) such that the Hessian is ∇²ℓ + λI: of g, or of the attack's loss; None for ℓ where it is λI.

    Raises:
        InputError: where the attack's is asked for, and the lower problem has no ``attack_loss``.
    """
    if curvature == "lower":
        return problem.lower.curvature(model, solution)
    loss = getattr(problem.lower, "attack_loss", None)
    if loss is None:
        raise InputError(f'curvature="attack" needs an attack_loss, and {type(problem.lower).__name__} has none')
    return lambda batch, delta, anchor: as_loss(loss)(model, batch, delta), solution.lam


def scalar_adjoint(diagonal: Tensor, active: ActiveSet, v: Tensor) -> Tensor:
    """w = T v / diagonal, the adjoint where H is a multiple of the identity."""
    return active.tangent(v) / per_sample(diagonal, v)


def with_multiplier(total: Tensor, active: ActiveSet) -> Tensor:
    """``total`` + μ, ``[B]``."""
    return total if active.curvature is None else total + active.curvature


def _check_merged(attacked: Attacked) -> None:
    """Raise :class:`InputError` unless the cross derivative at δ* is that of minus the upper loss."""
    upper, lower, model = attacked.problem.upper, attacked.problem.lower, attacked.model
    needs = 'cross_at="merged" needs'
    of_lower = isinstance(lower, Proximal) or (
        isinstance(lower, Linearized) and direction_of(lower.direction) == taylor
    )
    if not of_lower:
        raise InputError(f'{needs} Proximal, or Linearized with direction "taylor"; use cross_at="solution"')
    attack_loss: AnyLoss = lower.attack_loss
    criterion = getattr(upper, "criterion", None)
    plain = type(upper).loss_at is UpperProblem.loss_at and type(upper).prepare is UpperProblem.prepare
    if not (plain and isinstance(attack_loss, minus) and _same_loss(attack_loss.loss, criterion)):
        raise InputError(f'{needs} an attack loss that is minus the upper loss; use cross_at="solution"')
    mode = attack_mode_of(lower)
    if any(module.training != (mode == "train") for module in model.modules()):
        raise InputError(
            f"{needs} attack passes in the network's own mode; here they are in {mode!r} mode, and the network is not; "
            'use cross_at="solution"'
        )


def _same_loss(one: AnyLoss, other: AnyLoss | None) -> bool:
    if type(one) is CrossEntropy and type(other) is CrossEntropy:
        return one.label_smoothing == other.label_smoothing and one.over == other.over
    return one is other
