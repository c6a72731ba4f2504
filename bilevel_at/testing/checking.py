"""One check: the hypergradient, what has to hold before differences mean anything, and the differences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import InputError
from ..modes import same_buffers
from ..problem import BilevelProblem, base_at
from ..solution import Gradients, Hypergradient
from ..solver import Solver
from .causes import explain, reference
from .conditions import activity_margin, outside
from .differences import slope
from .fixed import Along, Fixed, Sources, with_fixed_step
from .purity import Fault, Watched, mean_over_samples, network_draws, pieces, reproducible, watching
from .report import DegenerateActivity, Direction, HypergradReport, difference, dot, norm_of
from .solver_faults import Compute

__all__ = ["Check", "Mode"]

Mode = Literal["directional", "full"]


class Check:
    """One check, from its first hypergradient to its report."""

    fixed: Fixed
    step: Hypergradient

    def __init__(
        self,
        problem: BilevelProblem,
        solver: Solver,
        model: nn.Module,
        batch: Batch,
        generator: torch.Generator,
        eps: float,
        rtol: float,
        atol: float,
    ) -> None:
        self.problem, self.solver, self.model, self.batch = problem, solver, model, batch
        self.generator, self.eps, self.rtol, self.atol = generator, eps, rtol, atol
        self.draws = self.after = generator.get_state()
        self.sources = Sources(batch.x.device)
        self.measured: list[Direction] = []
        self.free: float | None = None
        self.implicit_share: float | None = None
        self.norm = math.nan

    def prepare(self, anchor: Tensor | None, watched: Watched) -> None:
        """The anchor, the hypergradient, and F with everything but θ fixed.

        Raises:
            Fault: where F is no function of θ, or something of the caller's is changed.
        """
        name, fault = type(self.solver).__name__, None
        try:
            first = self._hypergradient(anchor)
        except RuntimeError as error:
            watched.check(f"{name}.hypergradient")  # autograd says of an edit only that there was one
            if "does not require grad" in str(error):
                raise Fault("upper term without θ", f"the upper loss has no graph at all ({error})") from error
            raise
        self.after = self.generator.get_state()
        try:
            watched.check(f"{name}.hypergradient")
        except Fault as seen:
            fault = seen
            watched.restore()
        z = (first.solution.anchor if anchor is None else anchor).detach().clone()
        self.step = step = self._hypergradient(z.clone())
        watched.restore()
        # Its δ* and anchor are copies: an edit in place must not change what everything is compared with.
        solution = replace(step.solution, delta=step.solution.delta.clone(), anchor=z)
        differentiable = self.solver.implicit and any(module.training for module in self.model.modules())
        self.fixed = Fixed(
            BilevelProblem(self.problem.upper, with_fixed_step(self.problem.lower, solution)),
            self.model,
            self.batch,
            solution,
            self.generator,
            self.draws,
            self.sources,
            differentiable,
        )
        if fault is not None:
            pieces(self.fixed, Watched(self.model, self.batch, solution.anchor))  # names the piece
            raise fault
        self._refuse_numbers()
        watched = Watched(self.model, self.batch, solution.anchor)
        with watching(watched, "evaluating F"):
            pieces(self.fixed, watched)
            reproducible(self.fixed)
        self._refuse_own_draws(anchor, first)
        given = step.solution.anchor
        if given.shape == z.shape and not torch.equal(given, z):
            raise Fault("anchor ignored", "solve_at hands on another anchor than the one that it gets")
        mean_over_samples(self.problem, self.fixed)
        self._refuse_infeasible()

    def _refuse_numbers(self) -> None:
        """Raise :class:`Fault` where a number is not finite, or has been through less than float64."""
        step, solution = self.step, self.step.solution
        for what, value in {"δ*": solution.delta, "the upper loss": step.losses}.items():
            if value.dtype != torch.float64:
                raise Fault("precision", f"{what} is {value.dtype}: differences need float64 all the way")
            if not value.isfinite().all():
                raise Fault("not finite", f"{what} has values that are not finite")
        for name, gradient in step.grads.items():
            if gradient is not None and not gradient.isfinite().all():
                raise Fault("not finite", f"the hypergradient of {name} has values that are not finite")

    def _refuse_own_draws(self, anchor: Tensor | None, first: Hypergradient) -> None:
        """Raise :class:`Fault` where the anchor or the solver draws from another source than the generator."""

        def moved_by(moved: tuple[str, ...]) -> str | None:
            again = self._hypergradient(anchor, moved=moved)
            one, other = again.solution.anchor, first.solution.anchor
            if one.shape != other.shape or not torch.equal(one, other):
                return "the anchor"
            return f"{type(self.solver).__name__}.hypergradient" if _far(again.grads, first.grads) else None

        if moved_by(Sources.NAMES) is None:
            return
        for source in Sources.NAMES:
            who = moved_by((source,))
            if who is not None and not (source == Sources.NAMES[0] and network_draws(self.fixed)):
                raise Fault("hidden randomness", f"{who} depends on {source}; draw from the generator that is passed")

    def _refuse_infeasible(self) -> None:
        lower, solution = self.problem.lower, self.fixed.solution
        gap = outside(lower, self.model, solution).max().item()
        if gap <= 1e-7:
            return
        base = base_at(lower, self.model, solution.batch)
        once = lower.constraint.project(solution.delta, base)
        twice = (lower.constraint.project(once, base) - once).abs().max().item()
        if twice > 1e-7:
            raise Fault("infeasible", f"project is no projection: done again it moves what it gives by {twice:.3g}")
        raise Fault("infeasible", f"δ* is outside its constraint: ‖δ* − P_C(δ*)‖ is {gap:.3g} in its largest value")

    def refuse_degenerate(self, least: float) -> None:
        """Raise :class:`DegenerateActivity` where the activity margin is below ``least``."""
        with self.fixed.again():
            z = self.fixed.solution.anchor.clone()
            margin = activity_margin(self.fixed.problem, self.model, self.batch, z, self.generator)
        if margin < least:
            raise DegenerateActivity(f"activity margin {margin:.2g} is below min_margin={least:g}")

    def _hypergradient(
        self, anchor: Tensor | None, solver: Solver | None = None, moved: tuple[str, ...] = ()
    ) -> Hypergradient:
        self.generator.set_state(self.draws)
        with same_buffers(self.model), self.sources.fixed(moved):
            return (solver or self.solver).hypergradient(
                self.problem, self.model, self.batch, anchor=anchor, generator=self.generator
            )

    def run(self, mode: Mode, directions: int, min_implicit: float) -> None:
        """Differences along every direction.

        Raises:
            Fault: where one disagrees, with the cause; where the implicit term is too small to be checked.
        """
        step, named = self.step, dict(self.model.named_parameters())

        def compute(solver: Solver) -> Hypergradient:
            return self._hypergradient(self.fixed.solution.anchor.clone(), solver)

        exact = reference(step, self.solver, compute)
        self.norm = norm_of(step.grads)
        self._shares(exact)
        # A wrong hypergradient, which may be large, must not say how wrong it may be.
        norm = self.norm if exact is None else min(self.norm, norm_of(exact.grads))
        allowed = self.rtol * norm + self.atol
        seed = torch.Generator().manual_seed(0)  # on the CPU, wherever the model is
        tried: list[tuple[str, Along]] = []
        for name, parameter in named.items():
            if parameter.requires_grad:
                tried += [(name, {name: unit}) for unit in _directions(parameter, mode, directions, seed)]
        tried += list(_telling(step, exact))
        for name, along in tried:
            analytic = dot(step.grads, along)
            numeric = slope(self.fixed.total, self.model, along, self.eps, analytic, allowed)
            self.measured.append(Direction(name, along, analytic, numeric.value, numeric.uncertainty, allowed))
        if not all(direction.agrees for direction in self.measured):
            raise self._explained(exact, compute)
        if self.implicit_share is not None and self.implicit_share < min_implicit:
            raise Fault("vacuous", self._vacuous(min_implicit))

    def _explained(self, exact: Hypergradient | None, compute: Compute) -> Fault:
        try:
            reproducible(self.fixed)  # a state may have begun to count late
            return Fault(*explain(self.solver, self.fixed, self.step, exact, self.measured, self.eps, compute))
        except Fault as fault:
            return fault
        except Exception as error:  # the verdict stands, whatever the user's code raises while its cause is looked for
            return Fault("unexplained", f"{type(error).__name__} while looking for the cause: {error}")

    def _shares(self, exact: Hypergradient | None) -> None:
        """How much there is to check: the share of directions in which δ* may move, and of the implicit term."""
        if exact is None:
            if self.step.implicit and self.norm > 0:
                self.implicit_share = norm_of(self.step.implicit) / self.norm
            return
        self.free = _free_share(self.problem, self.model, exact)
        whole = norm_of(exact.grads)
        if exact.implicit:
            self.implicit_share = norm_of(exact.implicit) / whole if whole > 0 else 0.0

    def _vacuous(self, least: float) -> str:
        share = f"the implicit term is {self.implicit_share:.2g} of the hypergradient, below min_implicit={least:.2g}"
        if self.free is None:
            return f"{share}: whether it is right cannot be told here"
        return (
            f"{share}, with {100 * self.free:.3g} % of the directions of δ* free: whether it is right cannot be told "
            f"here. {self._remedy()}; min_implicit=0 checks the rest"
        )

    def _remedy(self) -> str:
        if self.step.v.norm() == 0:
            return "f does not depend on δ there"
        if self.free is not None and self.free > 0.5:
            return "Take a longer step 1/λ, so that δ* moves with θ"
        return "Take a shorter step 1/λ or a larger ε, so that less of δ* is at a bound"

    def report(self, passed: bool, cause: str | None = None, text: str = "") -> HypergradReport:
        return HypergradReport(
            passed=passed,
            solver=type(self.solver).__name__,
            directions=tuple(self.measured),
            norm=self.norm,
            rtol=self.rtol,
            free=self.free,
            implicit_share=self.implicit_share,
            cause=cause,
            explanation=text,
        )


def _far(one: Gradients, other: Gradients) -> bool:
    """Whether gradients differ by more than sums in another order do."""
    return norm_of(difference(one, other)) > 1e-9 * norm_of(other) + 1e-300


def _free_share(problem: BilevelProblem, model: nn.Module, exact: Hypergradient) -> float | None:
    """The share of dimensions along which δ* may move without leaving an active constraint."""
    solution = exact.solution
    try:
        with torch.no_grad(), same_buffers(model):
            base = base_at(problem.lower, model, solution.batch)
            active = problem.lower.constraint.active(solution.delta, base, solution.gradient)
    except (InputError, AttributeError):
        return None
    free = active.free.flatten(1).sum(1).double()
    if active.normals is not None:
        free = free - active.normals.flatten(1).square().sum(1)  # orthonormal rows, or rows of zeros
    return (free.sum() / active.free.numel()).item()


def _directions(parameter: Tensor, mode: str, directions: int, seed: torch.Generator) -> Iterator[Tensor]:
    if mode == "full":
        for i in range(parameter.numel()):
            unit = torch.zeros_like(parameter).flatten()
            unit[i] = 1.0
            yield unit.reshape(parameter.shape)
        return
    for _ in range(directions):
        unit = torch.randn(parameter.shape, dtype=parameter.dtype, generator=seed).to(parameter.device)
        yield unit / unit.norm()


def _telling(step: Hypergradient, exact: Hypergradient | None) -> Iterator[tuple[str, Along]]:
    """Unit directions along which an error shows whole, where along a random one it shows divided by √n."""
    vectors: list[tuple[str, Gradients]] = [("the hypergradient", step.grads), ("its implicit term", step.implicit)]
    if exact is not None:
        differs = difference(step.grads, exact.grads)
        vectors.append(("what it differs by from the implicit function theorem's", differs))
    whole = norm_of(step.grads)
    for name, vector in vectors:
        length = norm_of(vector)
        if math.isfinite(length) and length > 1e-12 * whole:
            yield name, {n: g.detach() / length for n, g in vector.items() if g is not None}
