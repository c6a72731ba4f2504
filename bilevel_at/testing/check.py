"""``hypergradcheck``: a hypergradient against differences of F(θ), as ``gradcheck`` does for gradients."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import InputError, one_of, positive, whole_number
from ..modes import same_buffers
from ..problem import BilevelProblem
from ..solver import Solver
from .checking import Check, Mode
from .purity import Fault, Watched, watching
from .report import HypergradReport

__all__ = ["hypergradcheck", "hypergradreport"]


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
    _check_arguments(model, batch, eps, mode, directions)
    if generator is None:
        generator = torch.Generator(batch.x.device).manual_seed(0)
    check = Check(problem, solver, model, batch, generator, eps, rtol, atol)
    watched = Watched(model, batch, anchor)
    # Whatever a callback does, and wherever it raises, the caller's objects have their values afterwards.
    with same_buffers(model), check.sources.fixed():
        try:
            check.prepare(anchor, watched)
            if min_margin:
                check.refuse_degenerate(min_margin)
            check.run(mode, directions, 10 * rtol if min_implicit is None else min_implicit)
            with watching(watched, "a call after the first ones"):
                return check.report(True)
        except Fault as fault:
            return check.report(False, fault.cause, fault.text)
        finally:
            watched.restore()
            generator.set_state(check.after)


def _check_arguments(model: nn.Module, batch: Batch, eps: float, mode: str, directions: int) -> None:
    low = [(n, p.dtype) for n, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float64]
    if low:
        raise InputError(f"parameter {low[0][0]} is {low[0][1]}; hypergradcheck needs float64 (model.double())")
    if batch.x.is_floating_point() and batch.x.dtype != torch.float64:
        raise InputError(f"batch.x is {batch.x.dtype}; hypergradcheck needs float64 (x.double())")
    positive("eps", eps)
    one_of("mode", mode, get_args(Mode))
    whole_number("directions", directions, 1)
