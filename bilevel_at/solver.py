"""The hypergradient, once.

    dF/dθ = ∇_θ f(θ, δ*) − ig_weight · ∇_θ ⟨∇_δ g(θ, δ*; z), w⟩        w constant

Solvers differ only in the adjoint w, which lives in δ-space: the solution of T(H + μI)T w = T v on the directions T
that the active constraints leave free, with v = ∇_δ f and H = ∇²_δδ g. This is Proposition 1 of the Fast-BAT paper
(Zhang et al., 2022) as a vector-Jacobian product: nothing of size |θ|×d is ever formed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from . import policy
from .batch import Batch, per_sample
from .constraints import ActiveSet
from .errors import InputError, at_least, one_of
from .losses import check_prepared, check_values
from .modes import attack_mode
from .policy import Policy
from .problem import BilevelProblem, LowerProblem, attack_mode_of, objective_gradient
from .solution import Hypergradient, Solution

__all__ = ["CrossAt", "Curvature", "KKTSolver", "Solver"]

CrossAt = Literal["anchor", "solution"]
Curvature = Literal["lower", "attack"]


class Solver(Policy):
    """Couples the two players. A subclass defines :meth:`adjoint` and is used like a loss:

        opt.zero_grad(); step = solver.backward(problem, model, batch); opt.step()

    Class attribute implicit: whether the lower problem's solution is to be differentiated; False where w = 0.
    """

    implicit: ClassVar[bool] = True
    ig_weight: float = 1.0

    def adjoint(self, problem: BilevelProblem, model: nn.Module, solution: Solution, v: Tensor) -> Tensor:
        """w for v = ∇_δ f, both shaped like δ* and of the batch **mean** of f."""
        raise NotImplementedError(f"{type(self).__name__} does not define adjoint(problem, model, solution, v)")

    def lower_gradient(self, lower: LowerProblem, model: nn.Module, solution: Solution) -> Tensor | None:
        """∇_δ g(θ, δ*; z) whose derivative in θ is the cross derivative; None where δ* has no derivative."""
        return solution.gradient

    @torch.enable_grad()
    def hypergradient(
        self,
        problem: BilevelProblem,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        scale: float = 1.0,
    ) -> Hypergradient:
        """dF/dθ of the mean upper loss F(θ) = mean_i f(θ, δ*_i(θ)). Changes nothing but the network's own buffers.

        A network that draws at random itself (dropout) does so from torch's global generator.

        Args:
            problem: the two players.
            model: the network.
            batch: the examples.
            anchor: z ``[B, ...]``, to hold it fixed; drawn by the problem's anchor if not given.
            generator: for everything that is drawn at random, in this order: by the upper problem, the attack loss, the
                anchor, the upper loss.
            scale: multiplies the upper loss before anything is differentiated.

        Raises:
            InputError: where no parameter requires a gradient, and where this solver differentiates δ* and the lower
                problem says that it has no derivative.
            ConvergenceError, CurvatureError: as the lower level and the adjoint do.
        """
        upper, lower = problem.upper, problem.lower
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise InputError("no parameter of the model requires a gradient; there is nothing to differentiate in")
        parameters = list(named.values())

        seen = check_prepared(upper, upper.prepare(model, batch, generator))
        solution = lower.solve(model, batch, anchor, generator, differentiable=self.implicit)
        gradient = self.lower_gradient(lower, model, solution) if self.implicit else None
        if self.implicit and gradient is None:
            raise InputError(
                f"{type(lower).__name__} finds a δ* without a derivative in θ, which {type(self).__name__} needs; use "
                "ZeroIG"
            )
        has_implicit = gradient is not None and gradient.requires_grad and self.ig_weight != 0

        delta = solution.delta.detach().requires_grad_()
        losses = upper.loss_at(model, seen, replace(solution, delta=delta), generator)
        check_values("the upper loss", losses, batch)
        # A pass that the upper loss shares with the attack belongs to the lower gradient's graph too.
        passes = [solution.kept_output, *solution.batch.more.values()]
        shared = has_implicit and any(isinstance(p, Tensor) and p.requires_grad for p in passes)
        *direct, v = torch.autograd.grad(
            losses.mean() * scale, [*parameters, delta], allow_unused=True, retain_graph=shared
        )
        v = torch.zeros_like(delta) if v is None else v

        implicit: dict[str, Tensor | None] = {}
        if has_implicit and gradient is not None:
            w = self.adjoint(problem, model, replace(solution, gradient=gradient), v)
            cross = torch.autograd.grad(gradient, parameters, -self.ig_weight * w, allow_unused=True)
            implicit = dict(zip(named, cross, strict=True))
        return Hypergradient(
            losses.detach(), dict(zip(named, direct, strict=True)), implicit, _without_graphs(solution), v, scale
        )

    def backward(
        self,
        problem: BilevelProblem,
        model: nn.Module,
        batch: Batch,
        generator: torch.Generator | None = None,
        *,
        weight: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Hypergradient:
        """:meth:`hypergradient`, added to ``.grad`` as ``loss.backward()`` would, and observed by every policy.

        Args:
            problem, model, batch, generator: as for :meth:`hypergradient`.
            weight: multiplies what is added to ``.grad``; a batch that is taken in parts weights each by its share.
            scaler: a GradScaler, whose factor ``.grad`` and the returned gradients carry until ``scaler.step``.

        Raises:
            Exception: what :meth:`hypergradient` raises; ``.grad`` and everything remembered are then as they were. An
                ``observe`` that raises leaves ``.grad`` as it was, but not what was remembered before it.
        """
        scale = 1.0
        if scaler is not None and scaler.is_enabled():
            scaler.scale(torch.zeros((), device=batch.x.device))  # a scaler sets itself up on first use
            scale = scaler.get_scale()
        step = self.hypergradient(problem, model, batch, generator=generator, scale=scale)
        policy.observe((problem, self), step)  # in one walk: what both are made of observes once
        step.add_to(model, weight)
        return step


class KKTSolver(Solver):
    """What the KKT solvers share: their options, and the reduction to the free directions.

    Fields of a subclass: ``ig_weight``, ``damping``, ``cross_at``.
    """

    damping: float = 0.0
    cross_at: CrossAt = "anchor"

    def _check(self) -> None:
        for name in ("ig_weight", "damping"):
            at_least(name, getattr(self, name))
        one_of("cross_at", self.cross_at, ("anchor", "solution"))

    def lower_gradient(self, lower: LowerProblem, model: nn.Module, solution: Solution) -> Tensor | None:
        """∇_δ g at δ*; with ``cross_at="solution"``, of the g that is linearised (or anchored) at δ* instead of z."""
        gradient = solution.gradient
        if self.cross_at == "anchor" or gradient is None or not gradient.requires_grad:
            return gradient
        with attack_mode(model, attack_mode_of(lower)):
            moved = objective_gradient(lower, model, solution.batch, solution.delta, solution.delta)
        # The value stays ∇_δ g at δ*, which active sets look at; only its derivative in θ is the other one.
        return gradient.detach() + moved - moved.detach()

    @staticmethod
    def active(lower: LowerProblem, model: nn.Module, solution: Solution) -> ActiveSet:
        """The constraints that bind at δ*."""
        with torch.no_grad():
            base = lower.base(model, solution.batch)
        gradient = None if solution.gradient is None else solution.gradient.detach()
        return lower.constraint.active(solution.delta, base, gradient)

    def diagonal(self, lam: Tensor | float, solution: Solution, active: ActiveSet) -> Tensor:
        """λ + μ + damping for each row of δ*."""
        delta = solution.delta
        total = torch.zeros(len(delta), dtype=delta.dtype, device=delta.device) + lam + self.damping
        return total if active.curvature is None else total + active.curvature


def _without_graphs(solution: Solution) -> Solution:
    more = {name: value.detach() for name, value in solution.batch.more.items()}
    gradient = None if solution.gradient is None else solution.gradient.detach()
    return replace(solution, gradient=gradient, kept_output=None, batch=solution.batch.replace(**more))


def scalar_adjoint(diagonal: Tensor, active: ActiveSet, v: Tensor) -> Tensor:
    """w = T v / diagonal, the adjoint where H is a multiple of the identity."""
    return active.tangent(v) / per_sample(diagonal, v)
