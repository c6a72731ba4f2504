"""``hypergradcheck``: a hypergradient against central differences of F(θ), as ``gradcheck`` does for gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import InputError
from ..problem import BilevelProblem, Solution, UpperProblem
from ..solver import Solver

__all__ = ["DegenerateActivity", "HypergradError", "activity_margin", "hypergradcheck"]


class HypergradError(AssertionError):
    """A hypergradient does not agree with finite differences; the message has the worst parameter and both numbers."""


class DegenerateActivity(AssertionError):
    """δ* sits where a constraint is about to become active or inactive, so F is not differentiable there."""


def activity_margin(problem: BilevelProblem, model: nn.Module, batch: Batch, anchor: Tensor) -> float:
    """The least slack of an inactive constraint or multiplier of an active one, over the batch.

    At 0 strict complementarity fails and dδ*/dθ does not exist. Property tests should stay away from it.
    """
    with _untouched(model, problem):
        solution = problem.lower.solve_differentiable(model, batch, anchor=anchor)
    assert solution.gradient is not None
    distances = problem.lower.constraint.strict_complementarity(
        solution.delta, solution.batch.x, solution.gradient.detach()
    )
    return distances.min().item()


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
    mode: Literal["directional", "full"] = "directional",
    directions: int = 1,
    min_margin: float = 0.0,
    raise_exception: bool = True,
) -> bool:
    """Hold ``solver.hypergradient`` against (F(θ + eps·u) − F(θ − eps·u)) / 2 eps with the anchor held.

    F(θ) = mean_i f(θ, δ*_i(θ)), every δ* solved anew; what else the lower level drew or adapted is held too
    (:meth:`LowerProblem.held`). Wants float64.

    eps: the difference, along unit directions. rtol, atol: the check passes where |analytic − numeric| ≤
        rtol · ‖dF/dθ‖₂ + atol, the norm over all parameters.
    anchor: z to use; drawn once from the policy, with ``generator``, where None. What the upper loss draws from
        ``generator`` is the same in every evaluation.
    mode: "directional" tries ``directions`` random unit directions in each parameter tensor; "full" every entry.
    min_margin: raise :class:`DegenerateActivity` where :func:`activity_margin` is below this.

    Returns True; where the check fails, or a number is not finite, raises :class:`HypergradError` with the worst
    parameter and both numbers, or returns False with ``raise_exception=False``. Raises :class:`InputError` for
    parameters or inputs not in float64.
    The model's parameters, buffers and ``.grad``, and what the problem remembers, are left as they were.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    low = [n for n, p in named.items() if p.dtype != torch.float64]
    if low:
        raise InputError(f"parameter {low[0]} is {named[low[0]].dtype}; hypergradcheck needs float64 (model.double())")

    if batch.x.dtype != torch.float64:
        raise InputError(f"batch.x is {batch.x.dtype}; hypergradcheck needs float64 (x.double())")

    if generator is None:
        generator = torch.Generator(batch.x.device).manual_seed(int(torch.randint(2**31, ())))
    upper = _SameDraws(problem.upper)
    with _untouched(model, problem):
        drawn = BilevelProblem(upper, problem.lower)
        step = solver.hypergradient(drawn, model, batch, anchor=anchor, generator=generator)
        solution = step.solution
        held = BilevelProblem(upper, problem.lower.held(solution))
        z = solution.anchor.detach().clone()
        if min_margin:
            margin = activity_margin(held, model, batch, z)
            if margin < min_margin:
                raise DegenerateActivity(f"activity margin {margin:.2g} is below min_margin={min_margin:g}")

        norm = torch.stack([g.norm() for g in step.grads.values() if g is not None]).norm().item()
        seed = torch.Generator().manual_seed(0)  # on the CPU, wherever the model is
        worst: tuple[float, str, float, float] = (-1.0, "", 0.0, 0.0)
        for name, parameter in named.items():
            gradient = step.grads[name]
            for unit in _directions(parameter, mode, directions, seed):
                analytic = 0.0 if gradient is None else (gradient * unit).sum().item()
                numeric = _central_difference(held, model, solution, batch, parameter, unit, eps, generator)
                gap = abs(analytic - numeric)
                worst = max(worst, (gap if math.isfinite(gap) else math.inf, name, analytic, numeric))

    error, name, analytic, numeric = worst
    allowed = rtol * norm + atol
    if error <= allowed:
        return True
    if raise_exception:
        raise HypergradError(
            f"{type(solver).__name__} disagrees with finite differences, most in {name}: analytic {analytic:.10g}, "
            f"numeric {numeric:.10g}, difference {error:.3g}, allowed {allowed:.3g} (rtol {rtol:g} × norm {norm:.3g})"
        )
    return False


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


class _SameDraws(UpperProblem):
    """An upper problem whose generator begins, every time, where it did the first time."""

    def __init__(self, upper: UpperProblem) -> None:
        self.upper = upper
        self.state: Tensor | None = None

    def loss_at(
        self, model: nn.Module, batch: Batch, solution: Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        if generator is not None:
            if self.state is None:
                self.state = generator.get_state()
            generator.set_state(self.state)
        return self.upper.loss_at(model, batch, solution, generator)


def _central_difference(
    problem: BilevelProblem,
    model: nn.Module,
    held: Solution,
    batch: Batch,
    parameter: Tensor,
    unit: Tensor,
    eps: float,
    generator: torch.Generator,
) -> float:
    """(F(θ + eps·u) − F(θ − eps·u)) / 2 eps, from the anchor and the targets of ``held``."""
    original = parameter.detach().clone()
    values = []
    try:
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(original + sign * eps * unit)
            solution = Solution.of(problem.lower.solve(model, held.batch, anchor=held.anchor), held.batch)
            values.append(problem.upper.loss_at(model, batch, solution, generator).mean().item())
    finally:
        with torch.no_grad():
            parameter.copy_(original)
    return (values[0] - values[1]) / (2 * eps)


@contextmanager
def _untouched(model: nn.Module, problem: BilevelProblem) -> Iterator[None]:
    """Batch statistics move during passes in train mode, and problems remember; put it all back."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = copy.deepcopy(problem.state_dict())
    try:
        yield
    finally:
        problem.load_state_dict(state)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
