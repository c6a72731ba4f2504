"""Assertions about problems and solvers of your own, for a test suite: feasible, optimal, reproducible."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import name_samples
from ..modes import same_buffers
from ..problem import BilevelProblem
from ..solution import Hypergradient, Solution
from ..solver import Solver
from .conditions import kkt_residual, outside
from .fixed import Fixed, Sources
from .purity import Fault, Watched, network_draws, pieces, reproducible, watching

__all__ = ["assert_feasible", "assert_kkt", "assert_reproducible"]


def assert_feasible(
    problem: BilevelProblem,
    model: nn.Module,
    batch: Batch,
    *,
    anchor: Tensor | None = None,
    generator: torch.Generator | None = None,
    tol: float | None = None,
) -> None:
    """δ* is in its constraint, for every sample: max |δ* − P_C(δ*)| ≤ tol.

    Args:
        problem: the problem.
        model: the network; its statistics are restored.
        batch: the examples, in any precision.
        anchor: z; drawn by the anchor policy if not given.
        generator: for what is drawn.
        tol: eps^½ of the dtype by default: 3e-4 in float32, 1.5e-8 in float64.

    Raises:
        AssertionError: with the samples, and how far the worst is outside.
    """
    solution = _solved(problem, model, batch, anchor, generator)
    gap = outside(problem.lower, model, solution)
    _at_most(gap, _tol(solution, tol), "δ* is outside its constraint", "‖δ* − P_C(δ*)‖_∞")


def assert_kkt(
    problem: BilevelProblem,
    model: nn.Module,
    batch: Batch,
    *,
    anchor: Tensor | None = None,
    generator: torch.Generator | None = None,
    tol: float | None = None,
) -> None:
    """δ* satisfies the KKT conditions of g over C: max |δ* − P_C(δ* − ∇_δ g / λ)| ≤ tol, for every sample.

    That is what the implicit function theorem starts from (Fast-BAT paper, equation 4 and Proposition 1). Of a lower
    level that stops early, or whose ``solve_at`` and ``objective`` do not belong together, it says by how much.

    Args:
        problem: the problem; its lower level has an ``objective``.
        model, batch, anchor, generator, tol: as for :func:`assert_feasible`.

    Raises:
        AssertionError: with the samples, and the residual of the worst.
        NotImplementedError: where the lower problem has no ``objective``.
    """
    solution = _solved(problem, model, batch, anchor, generator)
    with same_buffers(model), Sources(batch.x.device).fixed():
        residual = kkt_residual(problem.lower, model, solution)
    _at_most(residual, _tol(solution, tol), "δ* does not minimise g over its constraint", "‖δ* − P_C(δ* − ∇g/λ)‖_∞")


def assert_reproducible(
    problem: BilevelProblem,
    solver: Solver,
    model: nn.Module,
    batch: Batch,
    *,
    generator: torch.Generator | None = None,
) -> None:
    """``solver.hypergradient`` is a function of its arguments: the same draws give the same bits, and nothing changes.

    Two calls from the same state of the generator return equal losses and gradients; the anchor of the first, handed
    back, gives the same δ*; parameters, the batch, ``.grad`` and what the problem remembers stay as they are; and no
    draw comes from anywhere but ``generator`` (a network's own dropout may).

    Args:
        problem, solver, model, batch: as for :func:`hypergradcheck`, in any precision.
        generator: for what is drawn; its state is restored.

    Raises:
        AssertionError: with what has changed, and in which call.
    """
    generator = torch.Generator(batch.x.device).manual_seed(0) if generator is None else generator
    draws, sources = generator.get_state(), Sources(batch.x.device)

    def step(anchor: Tensor | None = None, moved: tuple[str, ...] = ()) -> Hypergradient:
        generator.set_state(draws)
        with same_buffers(model), sources.fixed(moved):
            return solver.hypergradient(problem, model, batch, anchor=anchor, generator=generator)

    remembered = _flat(problem.state_dict())
    watched = Watched(model, batch)
    try:
        with watching(watched, f"{type(solver).__name__}.hypergradient"):
            one = step()
        fixed = Fixed(problem, model, batch, one.solution, generator, draws, sources)
        with watching(watched, "evaluating F"):
            pieces(fixed, Watched(model, batch, one.solution.anchor))
            reproducible(fixed)
        _same_bits(one, step())
        if not network_draws(fixed):
            _same_bits(one, step(moved=Sources.NAMES), " with other seeds of the global generators")
        again = step(one.solution.anchor.clone())
        if not torch.equal(again.solution.delta, one.solution.delta):
            raise Fault("hidden state", "solve from the anchor that it handed back gives another δ*")
        now = _flat(problem.state_dict())
        for name, value in now.items():
            if name not in remembered or not _equal(value, remembered[name]):
                raise Fault("hidden state", f"state_dict()'s {name} has changed; what is remembered changes in observe")
    except Fault as fault:
        raise AssertionError(f"{fault.cause}: {fault.text}") from None
    finally:
        watched.restore()
        generator.set_state(draws)


def _solved(
    problem: BilevelProblem,
    model: nn.Module,
    batch: Batch,
    anchor: Tensor | None,
    generator: torch.Generator | None,
) -> Solution:
    with same_buffers(model), Sources(batch.x.device).fixed():
        return problem.lower.solve(model, batch, anchor, generator)


def _tol(solution: Solution, tol: float | None) -> float:
    return torch.finfo(solution.delta.dtype).eps ** 0.5 if tol is None else tol


def _at_most(values: Tensor, tol: float, what: str, measure: str) -> None:
    bad = (~(values <= tol)).nonzero().flatten().tolist()
    if bad:
        raise AssertionError(f"{what} on {name_samples(bad)}: {measure} is {values.max():.3g}, allowed {tol:.3g}")


def _same_bits(one: Hypergradient, other: Hypergradient, when: str = "") -> None:
    cause = "hidden randomness" if when else "hidden state"
    if not torch.equal(one.solution.delta, other.solution.delta):
        raise Fault(cause, f"two solves with the same draws give different δ*{when}")
    if not torch.equal(one.losses, other.losses):
        raise Fault(cause, f"two calls with the same draws give different losses{when}")
    for name, gradient in one.grads.items():
        if not _equal(gradient, other.grads[name]):
            raise Fault(cause, f"two calls with the same draws give different gradients of {name}{when}")


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one == other


def _flat(state: Mapping[str, object], path: str = "") -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{path}{name}.")
        else:
            values[f"{path}{name}"] = value.clone() if isinstance(value, Tensor) else value
    return values
