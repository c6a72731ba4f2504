"""The hypergradient, once.

    dF/dθ = ∇_θ f(θ, δ*) − ig_weight · ∇_θ ⟨∇_δ g(θ, δ*; z), w⟩        w held constant

Solvers differ only in the adjoint w, which lives in δ-space: the solution of T(H + μI)T w = T v on the directions T
that the active constraints leave free, with v = ∇_δ f and H = ∇²_δδ g. This is Proposition 1 of the Fast-BAT paper
(Zhang et al., 2022) as a vector-Jacobian product: nothing of size |θ|×d is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .batch import Batch, per_sample
from .constraints import ActiveSet
from .errors import InputError
from .problem import BilevelProblem, CrossAt, Solution

__all__ = ["Hypergradient", "KKTSolver", "Solver"]


@dataclass
class Hypergradient:
    """What a solver computed.

    loss: the upper level's mean loss, detached. losses: the same per sample, ``[B]``.
    grads: dF/dθ by parameter name, for parameters that require a gradient; None where a parameter does not matter,
        as ``torch.autograd.grad(..., allow_unused=True)`` has it.
    solution: the lower level's solution.
    direct_norm, implicit_norm: ‖∇_θ f‖₂ and the norm of the implicit term as it was added, 0-dim tensors.
    implicit_cosine: the cosine between the two, 0 where either is zero.
    """

    loss: Tensor
    losses: Tensor
    grads: dict[str, Tensor | None]
    solution: Solution
    direct_norm: Tensor
    implicit_norm: Tensor
    implicit_cosine: Tensor


class Solver:
    """Couples the two players. A subclass defines :meth:`adjoint` and is used like a loss:

    opt.zero_grad(); step = solver.backward(problem, model, batch); opt.step()
    """

    implicit: ClassVar[bool] = True
    ig_weight: float = 1.0
    cross_at: CrossAt = "anchor"

    def adjoint(self, problem: BilevelProblem, model: nn.Module, solution: Solution, v: Tensor) -> Tensor:
        """w ``[B, ...]`` for v = ∇_δ f ``[B, ...]``, both of the batch **mean** of f."""
        raise NotImplementedError(f"{type(self).__name__} does not define adjoint(problem, model, solution, v)")

    def hypergradient(
        self,
        problem: BilevelProblem,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Hypergradient:
        """dF/dθ of the mean upper loss F(θ) = mean_i f(θ, δ*_i(θ)), without touching ``.grad``.

        anchor: holds z, ``[B, ...]``; otherwise the problem's policy draws it, with ``generator``.

        Raises :class:`InputError` where no parameter requires a gradient, and whatever the lower level or the
        adjoint raise (:class:`ConvergenceError`, :class:`CurvatureError`).
        """
        return self._hypergradient(problem, model, batch, anchor, generator, 1.0)

    def backward(
        self,
        problem: BilevelProblem,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
        scaler: torch.amp.GradScaler | None = None,
        weight: float = 1.0,
    ) -> Hypergradient:
        """:meth:`hypergradient`, accumulated into ``.grad`` as ``loss.backward()`` would.

        weight: multiplies what is added to ``.grad``, as ``(weight * loss).backward()`` would; the parts of a batch
            that is taken in pieces are weighted by their share of it.
        scaler: a GradScaler; the upper loss is scaled by it before anything is differentiated, so ``.grad`` and the
        returned ``grads`` carry its factor until ``scaler.step``.

        Raises what :meth:`hypergradient` raises; ``.grad`` is then as it was.
        """
        scale = 1.0
        if scaler is not None and scaler.is_enabled():
            scaler.scale(torch.zeros((), device=batch.x.device))  # a scaler sets itself up on first use
            scale = scaler.get_scale()
        step = self._hypergradient(problem, model, batch, anchor, generator, scale)
        for name, parameter in model.named_parameters():
            gradient = step.grads.get(name)
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = weight * gradient
            else:
                parameter.grad.add_(gradient, alpha=weight)
        return step

    @torch.enable_grad()
    def _hypergradient(
        self,
        problem: BilevelProblem,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None,
        generator: torch.Generator | None,
        scale: float,
    ) -> Hypergradient:
        upper, lower = problem.upper, problem.lower
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise InputError("no parameter of the model requires a gradient; there is nothing to differentiate in")
        names, parameters = list(named), list(named.values())

        if self.implicit:
            solution = lower.solve_differentiable(model, batch, anchor, generator, at=self.cross_at)
        else:
            solution = Solution.of(lower.solve(model, batch, anchor, generator), batch)
        couples = solution.gradient is not None and solution.gradient.requires_grad and self.ig_weight != 0
        learns = lower.learns and anchor is None
        delta = solution.delta = solution.delta.detach().requires_grad_(couples or learns)

        losses = upper.loss_at(model, batch, solution, generator)
        if losses.shape != (len(batch),):
            raise InputError(
                f"the upper loss has shape {tuple(losses.shape)}; it must be one value per sample, [{len(batch)}]"
            )
        objective = losses.mean()
        inputs = [*parameters, delta] if delta.requires_grad else parameters
        grads: list[Tensor | None] = list(torch.autograd.grad(objective * scale, inputs, allow_unused=True))
        v = grads.pop() if delta.requires_grad else None
        solution.delta = delta.detach()
        if learns and v is not None:
            lower.learn(solution, v / scale)

        direct_norm = _norm(grads, objective)
        implicit_norm = inner = torch.zeros_like(direct_norm)
        if couples and v is not None and solution.gradient is not None:
            w = self.adjoint(problem, model, solution, v)
            cross = torch.autograd.grad(solution.gradient, parameters, -self.ig_weight * w, allow_unused=True)
            implicit_norm, inner = _norm(cross, objective), _inner(grads, cross, objective)
            grads = [_add(g, c) for g, c in zip(grads, cross, strict=True)]
        if solution.gradient is not None:
            solution.gradient = solution.gradient.detach()

        return Hypergradient(
            objective.detach(),
            losses.detach(),
            dict(zip(names, grads, strict=True)),
            solution,
            direct_norm / scale,
            implicit_norm / scale,
            torch.where(inner == 0, inner, inner / (direct_norm * implicit_norm)).clamp(-1, 1),
        )


class KKTSolver(Solver):
    """What the two KKT solvers share: the options, and the reduction to the free directions."""

    damping: float = 0.0

    def _check(self) -> None:
        for name in ("ig_weight", "damping"):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise InputError(f"{name} is {value!r}; it must be a finite number, at least 0")
        if self.cross_at not in ("anchor", "solution"):
            raise InputError(f"cross_at is {self.cross_at!r}; choose 'anchor' or 'solution'")

    def _diagonal(self, lam: Tensor | float, solution: Solution, active: ActiveSet) -> Tensor:
        """λ + μ + damping for each sample, ``[B]``."""
        delta = solution.delta
        total = torch.zeros(len(delta), dtype=delta.dtype, device=delta.device) + lam + self.damping
        return total if active.curvature is None else total + active.curvature


def scalar_adjoint(diagonal: Tensor, active: ActiveSet, v: Tensor) -> Tensor:
    """w = T v / diagonal, the adjoint where H is a multiple of the identity."""
    return active.tangent(v) / per_sample(diagonal, v)


def _norm(tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
    present = [t.detach() if t.dtype == torch.float64 else t.detach().float() for t in tensors if t is not None]
    # One call for all parameters: on a GPU, a norm each would cost more to launch than to compute.
    return torch.stack(torch._foreach_norm(present)).norm() if present else torch.zeros_like(like.detach())


def _inner(a: Sequence[Tensor | None], b: Sequence[Tensor | None], like: Tensor) -> Tensor:
    pairs = [(x.detach(), y.detach()) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs:
        return torch.zeros_like(like.detach())
    # In float32 at least, and as few calls as there can be: on a GPU each costs more to launch than to compute.
    wide = [[t if t.dtype == torch.float64 else t.float() for t in part] for part in zip(*pairs, strict=True)]
    return torch.stack([product.sum() for product in torch._foreach_mul(*wide)]).sum()


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
