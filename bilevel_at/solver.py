"""The hypergradient, once.

    dF/dθ = ∇_θ f(θ, δ*) − ig_weight · ∇_θ ⟨∇_δ g(θ, δ*; z), w⟩        w constant

Solvers differ only in the adjoint w, which lives in δ-space: the solution of T(H + μI)T w = T v on the directions T
that the active constraints leave free, with v = ∇_δ f and H = ∇²_δδ g. This is Proposition 1 of the Fast-BAT paper
(Zhang et al., 2022) as a vector-Jacobian product: nothing of size |θ|×d is ever formed.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import policy, shares
from .batch import Batch
from .compiled import one_graph
from .errors import InputError
from .lockstep import raised_alike
from .losses import check_prepared, check_values
from .modes import Statistics, check_unwrapped, full_precision
from .policy import Policy
from .problem import BilevelProblem, LowerProblem, attack_mode_of
from .solution import Gradients, Hypergradient, Solution
from .twice import explained, first_order

__all__ = ["Attacked", "Solver", "Terms"]


@dataclass(frozen=True, eq=False)
class Attacked:
    """What a solver sees once the attack is over.

    problem, model: the two players and the network.
    parameters: those that require a gradient, by name.
    batch: as the upper problem has prepared it.
    solution: the lower level's.
    gradient: ∇_δ g, by :meth:`Solver.lower_gradient`; None for solvers with ``implicit`` False.
    moves: whether δ* depends on θ, so that there is an implicit term.
    generator: for what the upper loss draws.
    scale: multiplies the upper loss before anything is differentiated.
    statistics: the running statistics that attack passes have seen.
    """

    problem: BilevelProblem
    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    batch: Batch
    solution: Solution
    gradient: Tensor | None
    moves: bool
    generator: torch.Generator | None
    scale: float
    statistics: Statistics

    def losses(self, delta: Tensor, generator: torch.Generator | None) -> Tensor:
        """f at ``delta``: ``[B]``, or one number where the batch is coupled."""
        losses = self.problem.upper.loss_at(self.model, self.batch, replace(self.solution, delta=delta), generator)
        check_values("the upper loss", losses, self.batch)
        return losses

    def total(self, losses: Tensor) -> Tensor:
        """The mean of f times the scale: what is differentiated. Of several processes, each has its part of it."""
        return shares.mean(losses) * self.scale


class Terms(NamedTuple):
    """What follows an attack, as :class:`~bilevel_at.Hypergradient` has it."""

    losses: Tensor
    direct: Gradients
    implicit: Gradients
    v: Tensor


class Solver(Policy):
    """Couples the two players. A subclass defines :meth:`adjoint` and is used like a loss:

        opt.zero_grad(); step = solver.backward(problem, model, batch); opt.step()

    Class attributes:

    implicit: whether the lower problem's solution is to be differentiated; False where w = 0.
    first_order: whether that takes first-order passes alone, so that ∇_δ g needs no graph.
    """

    implicit: ClassVar[bool] = True
    first_order: bool = False
    ig_weight: float = 1.0

    def compile(self, backend: str = "inductor") -> None:
        """Compile :meth:`hypergradient` as one graph, in place, as ``torch.nn.Module.compile`` does a module.

        Attack, upper loss and double backward are one graph; what is remembered is observed outside it. It is compiled
        when it is first called, and again where a shape, a mode or a number that a policy reads has changed. Random
        draws are those that it makes uncompiled, but for a network's own (dropout), which come from ``generator`` too.
        Copies and pickles of the solver are not compiled.

        Args:
            backend: as for ``torch.compile``.

        Raises:
            InputError: where torch cannot compile this way; from :meth:`hypergradient`, where a problem, solver or
                network is no graph (it decides by values, or has an optimiser of torch's in it).
        """
        uncompiled = MethodType(type(self).hypergradient, self)  # compiling once more is compiling anew
        object.__setattr__(self, "hypergradient", one_graph(uncompiled, backend))

    def __getstate__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Without the compiled graph, which is this object's: a copy would go on with this one's settings."""
        # object.__getstate__, which does the rest, is of Python 3.11.
        slots = copyreg._slotnames(type(self))  # type: ignore[attr-defined]  # private, and pickle's own
        own = {name: value for name, value in vars(self).items() if name != "hypergradient"}
        return own, {name: getattr(self, name) for name in slots if hasattr(self, name)}

    def adjoint(self, problem: BilevelProblem, model: nn.Module, solution: Solution, v: Tensor) -> Tensor:
        """w for v = ∇_δ f, both shaped like δ* and of the batch **mean** of f."""
        raise NotImplementedError(f"{type(self).__name__} does not define adjoint(problem, model, solution, v)")

    def lower_gradient(self, lower: LowerProblem, model: nn.Module, solution: Solution) -> Tensor | None:
        """∇_δ g(θ, δ*; z) whose derivative in θ is the cross derivative; None where δ* has no derivative."""
        return solution.gradient

    def mixture(self) -> list[tuple[float, Solver]]:
        """(probability, solver) of what a step may do: this solver, unless it tosses a coin between others."""
        return [(1.0, self)]

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
            InputError: where no parameter requires a gradient, where this solver differentiates δ* and the lower
                problem says that it has no derivative, and where the network cannot be differentiated twice.
            ConvergenceError, CurvatureError: as the lower level and the adjoint do.
        """
        with explained(type(self).__name__):
            return self._hypergradient(problem, model, batch, anchor, generator, scale)

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
        check_unwrapped(model)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise InputError("no parameter of the model requires a gradient; there is nothing to differentiate in")

        seen = check_prepared(upper, upper.prepare(model, batch, generator))
        with first_order() if self.first_order else nullcontext():
            solution = lower.solve(model, batch, anchor, generator, differentiable=self.implicit)
            gradient = self.lower_gradient(lower, model, solution) if self.implicit else None
        if self.implicit and gradient is None:
            raise InputError(
                f"{type(lower).__name__} finds a δ* without a derivative in θ, which {type(self).__name__} needs; use "
                "ZeroIG"
            )
        moves = gradient is not None and gradient.requires_grad and self.ig_weight != 0
        statistics = Statistics(model if moves and attack_mode_of(lower) == "eval" else None)
        attacked = Attacked(problem, model, named, seen, solution, gradient, moves, generator, scale, statistics)
        losses, direct, implicit, v = self.differentiate(attacked)
        return Hypergradient(losses.detach(), direct, implicit, _without_graphs(solution), v, scale)

    def differentiate(self, attacked: Attacked) -> Terms:
        """What follows the attack: the losses, ∇_θ f, the implicit term, and v. Must change nothing.

        :meth:`direct_terms` and then, where δ* moves with θ, :meth:`implicit_term`.
        """
        losses, direct, v = self.direct_terms(attacked)
        implicit = self.implicit_term(attacked, v) if attacked.moves else {}
        return Terms(losses, direct, implicit, v)

    def direct_terms(self, attacked: Attacked) -> tuple[Tensor, Gradients, Tensor]:
        """(the losses, ∇_θ f by parameter name, v) from one pass at δ*."""
        solution, named = attacked.solution, attacked.parameters
        delta = solution.delta.detach().requires_grad_()
        losses = attacked.losses(delta, attacked.generator)
        # A pass that the upper loss shares with the attack belongs to the lower gradient's graph too.
        prepared = any(value.requires_grad for value in solution.batch.more.values())
        shared = attacked.moves and (solution.kept_output is not None or prepared)
        *direct, v = torch.autograd.grad(
            attacked.total(losses), [*named.values(), delta], allow_unused=True, retain_graph=shared
        )
        return losses, dict(zip(named, direct, strict=True)), torch.zeros_like(delta) if v is None else v

    def implicit_term(self, attacked: Attacked, v: Tensor) -> Gradients:
        """−ig_weight · ∇_θ ⟨∇_δ g, w⟩ by parameter name, w of :meth:`adjoint`, all in full precision under autocast."""
        named, gradient = attacked.parameters, attacked.gradient
        assert gradient is not None  # where δ* moves with θ there is one
        with full_precision(gradient.device), attacked.statistics.again():
            solution = replace(attacked.solution, gradient=gradient)
            w = raised_alike(attacked.model, lambda: self.adjoint(attacked.problem, attacked.model, solution, v))
            if not isinstance(w, Tensor) or w.shape != gradient.shape:
                got = f"shape {tuple(w.shape)}" if isinstance(w, Tensor) else f"a {type(w).__name__}"
                raise InputError(
                    f"{type(self).__name__}.adjoint returns {got}; w is a tensor shaped like δ*, "
                    f"{tuple(gradient.shape)}"
                )
            cross = torch.autograd.grad(gradient, list(named.values()), -self.ig_weight * w, allow_unused=True)
        return dict(zip(named, cross, strict=True))

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


def _without_graphs(solution: Solution) -> Solution:
    more = {name: value.detach() for name, value in solution.batch.more.items()}
    gradient = None if solution.gradient is None else solution.gradient.detach()
    return replace(solution, gradient=gradient, kept_output=None, batch=solution.batch.replace(**more))
