"""``hypergradcheck``: a hypergradient against differences of F(θ), as ``gradcheck`` does for gradients."""

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
from ..problem import BilevelProblem
from ..solution import Gradients, Hypergradient, Solution
from ..solver import Solver
from .causes import explain, reference
from .conditions import activity_margin, outside
from .differences import slope
from .fixed import Along, Fixed, Sources, with_fixed_step
from .purity import Fault, Watched, mean_over_samples, pieces, reproducible, watching
from .report import DegenerateActivity, Direction, HypergradReport, dot, norm_of

__all__ = ["hypergradcheck", "hypergradreport"]

Mode = Literal["directional", "full"]


def hypergradcheck(
    problem: BilevelProblem,
    solver: Solver,
    model: nn.Module,
    batch: Batch,
    eps: float = 1e-6,
    rtol: float = 1e-4,
    atol: float = 1e-10,
    *,
    anchor: Tensor | None = None,
    generator: torch.Generator | None = None,
    mode: Mode = "directional",
    directions: int = 1,
    min_margin: float = 0.0,
    min_implicit: float | None = None,
    raise_exception: bool = True,
) -> bool:
    """Compare ``solver.hypergradient`` with the derivative of F by differences, and say what is wrong.

    F(θ) = mean_i f(θ, δ*_i(θ)) with every δ* solved anew. What is a constant of the hypergradient is one of F too: the
    anchor, an adaptive step, the classes aimed at, batch statistics, and every random draw. Wants float64.

    Before it compares, it asks whether F is a function of θ (two evaluations agree; draws come from ``generator``),
    whether anything is edited in place, whether δ* is in its constraint, and whether there is an implicit term to be
    checked. Then it takes the derivative of F along random directions, along the hypergradient, along its implicit
    term, and along what that differs by from the implicit function theorem's; by (F(θ + eps·u) − F(θ − eps·u)) / 2 eps,
    and where that disagrees by Richardson's extrapolation for other eps. Where it fails, what the two differ by is held
    against what goes wrong in practice, and the message says what fits (:data:`CAUSES`).

    Args:
        problem: the problem.
        solver: the solver to be checked.
        model: the network, smooth and in float64.
        batch: the examples, in float64 where they are floating point.
        eps: the first difference, along unit directions.
        rtol: the check passes where |analytic − numeric| ≤ rtol · ‖dF/dθ‖₂ + atol, the norm over all parameters.
        atol: see ``rtol``.
        anchor: z to use; drawn once from the anchor policy, with ``generator``, if not given.
        generator: for whatever is drawn at random, the same in every evaluation of F; one of seed 0 if not given.
        mode: "directional" tries ``directions`` random unit directions in each parameter tensor; "full" every entry.
        directions: how many.
        min_margin: raise :class:`DegenerateActivity` where :func:`activity_margin` is below this.
        min_implicit: fail where δ* depends on θ, and the implicit term is less than this part of the hypergradient; by
            default 10 · rtol, below which an error of a tenth in it would pass. 0 checks what there is.
        raise_exception: raise where the check fails, rather than return False.

    Returns:
        True where the check passes. The model's parameters, buffers and ``.grad``, and what the problem remembers, are
        left as they were.

    Raises:
        HypergradError: where the check fails, or a number is not finite, with the worst parameter, both numbers, and
            the cause; ``error.report`` has everything that was measured.
        DegenerateActivity: see ``min_margin``.
        InputError: for parameters or inputs that are not in float64.
    """
    report = hypergradreport(
        problem,
        solver,
        model,
        batch,
        eps,
        rtol,
        atol,
        anchor=anchor,
        generator=generator,
        mode=mode,
        directions=directions,
        min_margin=min_margin,
        min_implicit=min_implicit,
    )
    if raise_exception:
        report.raise_for_failure()
    return report.passed


def hypergradreport(
    problem: BilevelProblem,
    solver: Solver,
    model: nn.Module,
    batch: Batch,
    eps: float = 1e-6,
    rtol: float = 1e-4,
    atol: float = 1e-10,
    *,
    anchor: Tensor | None = None,
    generator: torch.Generator | None = None,
    mode: Mode = "directional",
    directions: int = 1,
    min_margin: float = 0.0,
    min_implicit: float | None = None,
) -> HypergradReport:
    """What :func:`hypergradcheck` measures, for its arguments: every direction, shares, and the cause of a failure.

    Returns:
        A :class:`HypergradReport`, whether or not the check passes; ``print(report)`` shows it.

    Raises:
        DegenerateActivity, InputError: as :func:`hypergradcheck` does.
    """
    _check_dtypes(model, batch)
    if generator is None:
        generator = torch.Generator(batch.x.device).manual_seed(0)
    check = _Check(problem, solver, model, batch, generator, eps, rtol, atol)
    try:
        check.prepare(anchor)
        if min_margin:
            margin = activity_margin(check.fixed.problem, model, batch, check.fixed.solution.anchor)
            if margin < min_margin:
                raise DegenerateActivity(f"activity margin {margin:.2g} is below min_margin={min_margin:g}")
        return check.run(mode, directions, 10 * rtol if min_implicit is None else min_implicit)
    except Fault as fault:
        return check.report(False, fault.cause, fault.text)
    finally:
        check.leave()


def _check_dtypes(model: nn.Module, batch: Batch) -> None:
    low = [(n, p.dtype) for n, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float64]
    if low:
        raise InputError(f"parameter {low[0][0]} is {low[0][1]}; hypergradcheck needs float64 (model.double())")
    if batch.x.is_floating_point() and batch.x.dtype != torch.float64:
        raise InputError(f"batch.x is {batch.x.dtype}; hypergradcheck needs float64 (x.double())")


class _Check:
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
        self.draws = generator.get_state()
        self.after: Tensor | None = None
        self.sources = Sources(batch.x.device)
        self.measured: list[Direction] = []
        self.free: float | None = None
        self.implicit_share: float | None = None
        self.norm = math.nan

    def leave(self) -> None:
        """The generator goes on from where one hypergradient leaves it."""
        if self.after is not None:
            self.generator.set_state(self.after)

    def prepare(self, anchor: Tensor | None) -> None:
        """The anchor, the hypergradient, and what F is with everything fixed.

        Raises:
            Fault: where F is no function of θ, or something is edited in place.
        """
        watched = Watched(self.model, self.batch, anchor)
        try:
            first = self._hypergradient(anchor)
            self.after = self.generator.get_state()
            z = anchor if anchor is not None else first.solution.anchor
            fault: Fault | None = None
            try:
                watched.check(f"{type(self.solver).__name__}.hypergradient")
            except Fault as seen:
                fault = seen
        finally:
            watched.restore()
        z = z.detach().clone()
        step = self._hypergradient(z.clone())
        watched.restore()
        differentiable = self.solver.implicit and any(module.training for module in self.model.modules())
        lower = with_fixed_step(self.problem.lower, step.solution)
        self.step = step
        self.fixed = Fixed(
            BilevelProblem(self.problem.upper, lower),
            self.model,
            self.batch,
            # Its δ* and anchor are copies: an edit in place must not change what everything is held against.
            _copied(step.solution, z),
            self.generator,
            self.draws,
            self.sources,
            differentiable,
        )
        if fault is not None:
            pieces(self.fixed, Watched(self.model, self.batch, self.fixed.solution.anchor))  # names the piece
            raise fault
        watched = Watched(self.model, self.batch, self.fixed.solution.anchor)
        with watching(watched, "evaluating F"):
            pieces(self.fixed, watched)
            self.value = reproducible(self.fixed)
        mean_over_samples(self.problem, self.fixed)
        gap = outside(self.problem.lower, self.model, self.fixed.solution).max().item()
        if not gap <= 1e-7:
            raise Fault("infeasible", f"δ* is outside its constraint: ‖δ* − P_C(δ*)‖ is {gap:.3g} in its largest value")

    def _hypergradient(self, anchor: Tensor | None, solver: Solver | None = None) -> Hypergradient:
        self.generator.set_state(self.draws)
        with same_buffers(self.model), self.sources.fixed():
            return (solver or self.solver).hypergradient(
                self.problem, self.model, self.batch, anchor=anchor, generator=self.generator
            )

    def run(self, mode: Mode, directions: int, min_implicit: float) -> HypergradReport:
        """Differences along every direction; of a failure, the cause.

        Raises:
            Fault: where the implicit term is too small to be checked, or F has no derivative.
        """
        step, named = self.step, dict(self.model.named_parameters())
        self.norm = norm_of(step.grads)

        def compute(solver: Solver) -> Hypergradient:
            return self._hypergradient(self.fixed.solution.anchor.clone(), solver)

        exact = reference(step, self.solver, compute)
        self._shares(exact)
        allowed = self.rtol * self.norm + self.atol
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
        failed = [direction for direction in self.measured if not direction.agrees]
        if failed:
            cause, text = explain(self.problem, self.solver, self.fixed, step, exact, self.measured, self.eps, compute)
            return self.report(False, cause, text)
        if self.implicit_share is not None and self.implicit_share < min_implicit:
            return self.report(False, "vacuous", self._vacuous(min_implicit))
        return self.report(True)

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
            "here. Take a smaller step 1/λ or a larger ε, so that less of δ* is at a bound; min_implicit=0 checks the "
            "rest"
        )

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


def _copied(solution: Solution, anchor: Tensor) -> Solution:
    return replace(solution, delta=solution.delta.clone(), anchor=anchor)


def _free_share(problem: BilevelProblem, model: nn.Module, exact: Hypergradient) -> float | None:
    """The share of dimensions along which δ* may move without leaving an active constraint."""
    solution = exact.solution
    try:
        with torch.no_grad():
            base = problem.lower.base(model, solution.batch)
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
        differs = {name: _minus(step.grads.get(name), g) for name, g in exact.grads.items()}
        vectors.append(("what it differs by from the implicit function theorem's", differs))
    whole = norm_of(step.grads)
    for name, vector in vectors:
        length = norm_of(vector)
        if math.isfinite(length) and length > 1e-12 * whole:
            yield name, {n: g.detach() / length for n, g in vector.items() if g is not None}


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else -b
    return a - b
