"""Why a hypergradient disagrees with differences: what they differ by, compared with what goes wrong in practice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bilevel_at.solvers import FullKKT, HessianFreeKKT, ProjectionAdjoint, ZeroIG

from ..errors import BilevelError, InputError
from ..solution import Gradients, Hypergradient
from ..solver import Solver
from .conditions import activity_margin
from .differences import slope
from .fixed import Fixed, at, moved_by, unit_like
from .lower_faults import lower_fault
from .report import Direction, dot
from .solver_faults import Compute, named_factor, solver_fault

__all__ = ["CAUSES", "explain", "reference"]

CAUSES = {
    "hidden randomness": "F or the hypergradient depends on draws that no generator which is passed governs",
    "hidden state": "F differs between two evaluations at the same θ: something counts, caches or remembers",
    "edit in place": "computing F or its hypergradient changes θ, the batch or the anchor",
    "fills .grad": "computing F or its hypergradient adds to .grad",
    "mean over samples": "the attack loss is a mean over samples that share nothing: attacks depend on the batch size",
    "infeasible": "δ* is outside its constraint",
    "precision": "something between θ and F is computed in less than float64",
    "not finite": "F or the hypergradient is NaN or infinite",
    "no derivative": "F has a kink or a jump here: ReLU, a tie of classes, or a constraint about to (de)activate",
    "vacuous": "the implicit term is too small here for an error in it to be seen",
    "upper term without θ": "a term of the upper loss does not reach θ: detach, .data, no_grad, NumPy",
    "upper term": "∇_θ f of the solver is not that of the upper loss",
    "upper term without δ": "a term of the upper loss does not reach δ: delta.detach(), .data, no_grad, NumPy",
    "attack term without θ": "a term of g does not reach θ: detach, .data, no_grad, NumPy",
    "anchor depends on θ": "solve_at starts from an anchor of its own, which moves with θ",
    "anchor ignored": "solve_at solves from another anchor than the one that it is given",
    "constraint depends on θ": "base or the constraint moves with θ",
    "not a minimiser": "δ* does not minimise g over its constraint",
    "∇g": "solution.gradient is not the gradient of g in δ at δ*",
    "λ": "solution.lam, or curvature(), is not the curvature of g",
    "active set": "constraint.active() and constraint.project() disagree about what is free",
    "implicit term missing": "the solver leaves out the implicit term",
    "sign": "the solver's implicit term has the wrong sign",
    "factor": "the solver's implicit term is right up to a factor",
    "mask": "the solver's implicit term ignores or inverts the active constraints",
    "boundary": "the solver leaves out the curvature of the boundary, μ",
    "Hessian": "the solver leaves out the Hessian of g, or the proximal λ",
    "cross derivative at δ*": "the solver takes the cross derivative at δ* where g is linearised at z",
    "some parameters": "the solver's implicit term is right for some parameters and not for others",
    "unexplained": "none of these fits",
}
"""What a check may find, by name (``error.cause``), and what each means."""


def reference(step: Hypergradient, solver: Solver, compute: Compute) -> Hypergradient | None:
    """The hypergradient by the implicit function theorem as far as this library has it; None where it has none.

    Args:
        step: what ``solver`` has computed, which is the reference where it is one of these solvers itself.
        solver: the solver that is checked.
        compute: another one's hypergradient.
    """
    for candidate in (FullKKT(), ProjectionAdjoint(), HessianFreeKKT()):
        if _the_same(solver, candidate):
            return step
        try:
            return compute(candidate)
        except (InputError, BilevelError, NotImplementedError, AttributeError):  # the last: no constraint at all
            continue
    return None


def _the_same(solver: Solver, candidate: Solver) -> bool:
    """Whether the solver is that one, but for how and how exactly it solves its system."""
    as_they_are = ("ig_weight", "damping", "cross_at", "curvature")
    return type(solver) is type(candidate) and all(
        getattr(solver, name, None) == getattr(candidate, name, None) for name in as_they_are
    )


def explain(
    solver: Solver,
    fixed: Fixed,
    step: Hypergradient,
    exact: Hypergradient | None,
    measured: Sequence[Direction],
    eps: float,
    compute: Compute,
) -> tuple[str, str]:
    """(cause, explanation) of a check that has failed.

    Args:
        solver: what is checked.
        fixed: F, everything but θ fixed.
        step: the solver's hypergradient.
        exact: the one by the implicit function theorem, where there is one.
        measured: every direction that was tried.
        eps: the difference.
        compute: another solver's hypergradient, from the same anchor with the same draws.
    """
    failing = [direction for direction in measured if not direction.agrees]
    for direction in failing:
        for kind, value in (("the hypergradient", direction.analytic), ("F", direction.numeric)):
            if not math.isfinite(value):
                return "not finite", f"{kind} is {value} along {direction.name}"
    jumps = [_jump(fixed, direction, eps) for direction in failing[:3]]
    if all(jumps) or not any(direction.settled for direction in failing):
        return _no_derivative(fixed, failing[0], jumps[0], eps)
    chosen = sorted((d for d in measured if d.settled), key=lambda d: d.agrees)[:12]

    def numeric(value: Callable[[], float], gradients: Gradients, direction: Direction) -> float:
        expected = dot(gradients, direction.along)
        return slope(value, fixed.model, direction.along, eps, expected, direction.allowed).value

    direct = step.direct if exact is None or step.implicit or not exact.implicit else exact.direct
    for direction in chosen:
        value = numeric(fixed.direct, direct, direction)
        if abs(value - dot(direct, direction.along)) > direction.allowed:
            return _upper(step, compute, direction, value)
    fault = _slope_in_delta(fixed, step)
    if fault is not None:
        return fault
    home = {name: p.detach().clone() for name, p in fixed.model.named_parameters()}
    right: Gradients = {} if exact is None else exact.implicit
    for direction in chosen:
        value = numeric(lambda: fixed.implicit(home), right, direction)
        if abs(value - dot(right, direction.along)) > direction.allowed:
            fault = lower_fault(fixed, direction.along)
            if fault is not None:
                return fault
            return "unexplained", (
                f"moving δ* alone changes F by {value:.6g} along {direction.name}, where the implicit function theorem "
                f"says {dot(right, direction.along):.6g}"
            )
    if exact is None or not exact.implicit:
        return "upper term", (
            "δ* does not move with θ, and ∇_θ f is right, but the solver's hypergradient is something else"
        )
    return solver_fault(solver, step, exact, compute)


def _jump(fixed: Fixed, direction: Direction, eps: float) -> float:
    """By how much F's slopes to either side differ; 0 where that shrinks with the step, or is too little to matter."""
    here, jumps = fixed.total(), []
    for h in (10 * eps, eps):
        ends = []
        for sign in (1, -1):
            with at(fixed.model, moved_by(fixed.model, direction.along, sign * h)):
                ends.append((fixed.total() - here) / (sign * h))
        jumps.append(abs(ends[0] - ends[1]))
    return jumps[1] if jumps[1] > max(0.5 * jumps[0], 0.5 * direction.gap) else 0.0


def _no_derivative(fixed: Fixed, direction: Direction, jump: float, eps: float) -> tuple[str, str]:
    if jump:
        text = f"F's slopes to either side along {direction.name} differ by {jump:.3g}"
    else:
        text = (
            f"differences of F along {direction.name} do not settle: they are uncertain by "
            f"{direction.uncertainty:.3g}, the disagreement is {direction.gap:.3g}"
        )
    try:
        with fixed.again():
            z = fixed.solution.anchor.clone()
            margin = activity_margin(fixed.problem, fixed.model, fixed.batch, z, fixed.generator)
    except Exception:  # a lower problem of the user's own need not have one
        margin = math.inf
    if margin < 100 * eps:
        return "no derivative", f"{text}. A constraint is about to become active or inactive (margin {margin:.2g})"
    return (
        "no derivative",
        f"{text}. Take a smooth network and loss (tanh or softplus in place of ReLU), or another eps",
    )


def _upper(step: Hypergradient, compute: Compute, direction: Direction, value: float) -> tuple[str, str]:
    """∇_θ f disagrees with differences at a fixed δ*."""
    mine, autograd = dot(step.direct, direction.along), dot(compute(ZeroIG()).direct, direction.along)
    where = f"with δ* fixed, F changes by {value:.6g} along {direction.name}"
    if abs(autograd - value) <= direction.allowed:
        factor = mine / value if value else math.inf
        known = f", {named_factor(factor, step.solution)} times that" if math.isfinite(factor) else ""
        return "upper term", f"{where}, and the solver's ∇_θ f is {mine:.6g}{known}"
    return "upper term without θ", (
        f"{where}, and autograd's ∇_θ f is {autograd:.6g}: part of the upper loss is detached from θ (detach, .data, "
        "no_grad, NumPy)"
    )


def _slope_in_delta(fixed: Fixed, step: Hypergradient) -> tuple[str, str] | None:
    """What is wrong where ∇_δ f by autograd is not that by differences."""
    delta, h = fixed.solution.delta, 1e-6
    noise = unit_like(delta)
    measured = (fixed.direct(delta + h * noise) - fixed.direct(delta - h * noise)) / (2 * h)
    claimed = (step.v / step.scale * noise).sum().item()
    if abs(claimed - measured) <= 1e-4 * max(abs(measured), step.v.norm().item() / step.scale) + 1e-8:
        return None
    return "upper term without δ", (
        f"with θ fixed, F changes by {measured:.6g} along a random direction in δ, and autograd's ∇_δ f is "
        f"{claimed:.6g}: part of the upper loss is detached from δ (delta.detach(), .data, no_grad, NumPy)"
    )
