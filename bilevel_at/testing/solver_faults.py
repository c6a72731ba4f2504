"""What is wrong with a solver whose implicit term is not the implicit function theorem's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bilevel_at.solvers import FullKKT, HessianFreeKKT

from ..batch import per_sample
from ..errors import BilevelError, InputError
from ..kkt import KKTSolver
from ..problem import BilevelProblem
from ..solution import Gradients, Hypergradient, Solution
from ..solver import Solver
from .report import difference, dot, norm_of

__all__ = ["Compute", "named_factor", "solver_fault"]

Compute = Callable[[Solver], Hypergradient]


class _Adjoint(KKTSolver):
    """The implicit term with a w of its own: what a mistake in the adjoint would give."""

    def __init__(self, w: Callable[[KKTSolver, BilevelProblem, nn.Module, Solution, Tensor], Tensor]) -> None:
        self.w = w

    def adjoint(self, problem: BilevelProblem, model: nn.Module, solution: Solution, v: Tensor) -> Tensor:
        return self.w(self, problem, model, solution, v)


def _alternatives() -> Iterator[tuple[str, str, Solver]]:
    """(cause, what the solver's term then is, a solver that makes this mistake)."""

    def tangent(s: KKTSolver, problem: BilevelProblem, model: nn.Module, solution: Solution, v: Tensor) -> Tensor:
        return s.active(problem.lower, model, solution).tangent(v)

    def over_lam(s: KKTSolver, solution: Solution, v: Tensor) -> Tensor:
        return v / per_sample(s.proximal(solution), v)

    # Of two that are the same here, the first counts.
    yield "Hessian", "the one with λI in place of the Hessian of g", HessianFreeKKT()
    without_mu = _Adjoint(
        lambda s, problem, model, solution, v: over_lam(s, solution, tangent(s, problem, model, solution, v))
    )
    yield "boundary", "the one without the boundary's curvature μ", without_mu
    no_mask = _Adjoint(lambda s, problem, model, solution, v: over_lam(s, solution, v))
    yield "mask", "the one without the mask of active constraints", no_mask
    bound = _Adjoint(
        lambda s, problem, model, solution, v: over_lam(s, solution, v - tangent(s, problem, model, solution, v))
    )
    yield "mask", "the one of the coordinates that are not free", bound
    yield "Hessian", "the one with the Hessian of g taken as I", _Adjoint(tangent)
    moved = "its cross derivative at δ* in place of z"
    yield "cross derivative at δ*", f"the one with {moved}", FullKKT(cross_at="solution")
    yield "cross derivative at δ*", f"the Hessian-free one with {moved}", HessianFreeKKT(cross_at="solution")


def solver_fault(solver: Solver, step: Hypergradient, exact: Hypergradient, compute: Compute) -> tuple[str, str]:
    """The implicit function theorem agrees with differences, so the solver does not."""
    term = step.implicit or difference(step.grads, exact.direct)
    right = norm_of(exact.implicit)
    share = right / max(norm_of(exact.grads), 1e-300)
    if norm_of(term) <= 1e-9 * right:
        return "implicit term missing", (
            f"the solver has no implicit term, which is {100 * share:.3g} % of the hypergradient"
        )
    factor, rest = _fit(term, exact.implicit) if right > 0 else (0.0, 1.0)
    best = (rest, factor, "factor", "the right one")
    if rest > 1e-6:
        for cause, what, other in _alternatives():
            try:
                alternative = compute(other).implicit
            except (InputError, BilevelError, NotImplementedError, ArithmeticError):
                continue
            if norm_of(alternative) > 0:
                factor, rest = _fit(term, alternative)
                if rest < best[0] / 2:
                    best = (rest, factor, cause, what)
    rest, factor, cause, what = best
    if rest > 1e-3:
        names = [n for n, g in difference(term, exact.implicit).items() if g is not None and g.norm() > 1e-6 * right]
        if len(names) < sum(g is not None for g in exact.implicit.values()):
            return "some parameters", f"the solver's implicit term is right but for {', '.join(names)}"
        return "unexplained", (
            "the solver's implicit term is neither a multiple of the right one nor of one that leaves out the mask, "
            f"the Hessian or μ, or takes the cross derivative elsewhere (the nearest, {what}, leaves {rest:.2g} of it)"
        )
    weight = getattr(solver, "ig_weight", 1.0)
    because = f", as ig_weight={weight:g} says" if weight != 1.0 and math.isclose(factor, weight, rel_tol=1e-6) else ""
    named = f"{factor:.6g}" if because else named_factor(factor, step.solution)
    if cause == "factor" and math.isclose(factor, -1, rel_tol=1e-6):
        return "sign", "the solver's implicit term is minus the right one"
    if cause != "factor" and math.isclose(factor, 1, rel_tol=1e-4):
        return cause, f"the solver's implicit term is {what}"
    return cause, f"the solver's implicit term is {named} times {what}{because}"


def named_factor(factor: float, solution: Solution) -> str:
    """The factor, and what it is where it is known: λ, the size of the batch, ..."""
    rows = len(solution.delta)
    known: dict[str, float] = {"B, the size of the batch": rows, "1/B, B the size of the batch": 1 / rows}
    every = torch.as_tensor(solution.lam).flatten()
    one = every[0].item() if bool((every == every[0]).all()) else 0.0
    if one > 0:
        known |= {"λ": one, "1/λ": 1 / one, "λ²": one**2, "1/λ²": one**-2}
    for name, value in known.items():
        for sign in (1, -1):
            if math.isclose(factor, sign * value, rel_tol=1e-5) and not math.isclose(value, 1):
                return f"{factor:.6g} ({'−' if sign < 0 else ''}{name})"
    return f"{factor:.6g}"


def _fit(term: Gradients, candidate: Gradients) -> tuple[float, float]:
    """(c, ‖term − c·candidate‖ / ‖term‖) for the c that fits best."""
    factor = dot(term, {n: g for n, g in candidate.items() if g is not None}) / norm_of(candidate) ** 2
    scaled = {name: None if g is None else factor * g for name, g in candidate.items()}
    return factor, norm_of(difference(term, scaled)) / norm_of(term)
