"""``hypergradcheck``: a hypergradient against central differences of F(θ), as ``gradcheck`` does for gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import InputError
from ..modes import same_buffers
from ..problem import BilevelProblem, LowerProblem
from ..solution import Solution
from ..solver import Solver
from ..steps import Constant, Step

__all__ = ["DegenerateActivity", "HypergradError", "activity_margin", "hypergradcheck"]


class HypergradError(AssertionError):
    """A hypergradient does not agree with finite differences; the message has the worst parameter and both numbers."""


class DegenerateActivity(AssertionError):
    """δ* sits where a constraint is about to become active or inactive, so F is not differentiable there."""


def activity_margin(problem: BilevelProblem, model: nn.Module, batch: Batch, anchor: Tensor) -> float:
    """The least slack of an inactive constraint or multiplier of an active one, over the batch.

    At 0 strict complementarity fails and dδ*/dθ does not exist. Property tests should stay away from it.
    """
    lower = problem.lower
    with same_buffers(model):
        solution = lower.solve(model, batch, anchor=anchor, differentiable=True)
    if solution.gradient is None:
        raise InputError(f"{type(lower).__name__} finds a δ* without a derivative; it has no activity margin")
    base = lower.base(model, solution.batch).detach()
    return lower.constraint.strict_complementarity(solution.delta, base, solution.gradient.detach()).min().item()


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
    """Compare ``solver.hypergradient`` with (F(θ + eps·u) − F(θ − eps·u)) / 2 eps.

    F(θ) = mean_i f(θ, δ*_i(θ)) with every δ* solved anew. What is a constant of the hypergradient is one of F too: the
    anchor, an adaptive step, the classes aimed at, and every random draw. Wants float64.

    Args:
        problem: the problem.
        solver: the solver to be checked.
        model: the network, smooth and in float64.
        batch: the examples, in float64 where they are floating point.
        eps: the difference, along unit directions.
        rtol: the check passes where |analytic − numeric| ≤ rtol · ‖dF/dθ‖₂ + atol, the norm over all parameters.
        atol: see ``rtol``.
        anchor: z to use; drawn once from the anchor policy, with ``generator``, if not given.
        generator: for whatever is drawn at random, the same in every evaluation of F.
        mode: "directional" tries ``directions`` random unit directions in each parameter tensor; "full" every entry.
        directions: how many.
        min_margin: raise :class:`DegenerateActivity` where :func:`activity_margin` is below this.
        raise_exception: raise where the check fails, rather than return False.

    Returns:
        True where the check passes. The model's parameters, buffers and ``.grad``, and what the problem remembers, are
        left as they were.

    Raises:
        HypergradError: where the check fails, or a number is not finite, with the worst parameter and both numbers.
        InputError: for parameters or inputs that are not in float64.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    low = [n for n, p in named.items() if p.dtype != torch.float64]
    if low:
        raise InputError(f"parameter {low[0]} is {named[low[0]].dtype}; hypergradcheck needs float64 (model.double())")

    if batch.x.is_floating_point() and batch.x.dtype != torch.float64:
        raise InputError(f"batch.x is {batch.x.dtype}; hypergradcheck needs float64 (x.double())")

    if generator is None:
        generator = torch.Generator(batch.x.device).manual_seed(int(torch.randint(2**31, ())))
    draws = generator.get_state()
    with same_buffers(model):
        if anchor is None:
            anchor = solver.hypergradient(problem, model, batch, generator=generator).solution.anchor
        z = anchor.detach().clone()
        after = generator.get_state()
        generator.set_state(draws)
        step = solver.hypergradient(problem, model, batch, anchor=z, generator=generator)
        fixed = BilevelProblem(problem.upper, _with_fixed_step(problem.lower, step.solution))
        if min_margin:
            margin = activity_margin(fixed, model, batch, z)
            if margin < min_margin:
                raise DegenerateActivity(f"activity margin {margin:.2g} is below min_margin={min_margin:g}")

        norm = torch.stack([g.norm() for g in step.grads.values() if g is not None]).norm().item()
        seed = torch.Generator().manual_seed(0)  # on the CPU, wherever the model is
        worst: tuple[float, str, float, float] = (-1.0, "", 0.0, 0.0)
        for name, parameter in named.items():
            gradient = step.grads[name]
            for unit in _directions(parameter, mode, directions, seed):
                analytic = 0.0 if gradient is None else (gradient * unit).sum().item()
                loss = _MeanLoss(fixed, model, batch, step.solution, generator, draws)
                numeric = loss.central_difference(parameter, unit, eps)
                gap = abs(analytic - numeric)
                worst = max(worst, (gap if math.isfinite(gap) else math.inf, name, analytic, numeric))

    generator.set_state(after)
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


def _with_fixed_step(lower: LowerProblem, solution: Solution) -> LowerProblem:
    """The lower problem with the steps that ``solution`` was made with, whatever gradients say elsewhere."""
    if not isinstance(getattr(lower, "step", None), Step):
        return lower
    fixed = copy.copy(lower)
    object.__setattr__(fixed, "step", Constant(1 / solution.lam))
    return fixed


@dataclass(frozen=True)
class _MeanLoss:
    """F(θ), from the anchor and the targets of ``solution``, with the same draws every time."""

    problem: BilevelProblem
    model: nn.Module
    batch: Batch
    solution: Solution
    generator: torch.Generator
    draws: Tensor

    def __call__(self) -> float:
        self.generator.set_state(self.draws)
        upper, lower, model = self.problem.upper, self.problem.lower, self.model
        seen = upper.prepare(model, self.batch, self.generator)
        solution = lower.solve(model, self._attacked(), self.solution.anchor, self.generator)
        return upper.loss_at(model, seen, solution, self.generator).mean().item()

    def _attacked(self) -> Batch:
        """The batch, aimed at the classes that ``solution`` has chosen where it chose any."""
        target = self.solution.batch.more.get("target")
        if target is None or "target" in self.batch.more or len(target) != len(self.batch):
            return self.batch
        return self.batch.replace(target=target)

    def central_difference(self, parameter: Tensor, unit: Tensor, eps: float) -> float:
        """(F(θ + eps·u) − F(θ − eps·u)) / 2 eps."""
        original = parameter.detach().clone()
        values = []
        try:
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.copy_(original + sign * eps * unit)
                values.append(self())
        finally:
            with torch.no_grad():
                parameter.copy_(original)
        return (values[0] - values[1]) / (2 * eps)
