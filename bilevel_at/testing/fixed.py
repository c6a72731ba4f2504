"""F(θ) as a function of θ alone: the anchor, the steps, the classes aimed at, statistics and every draw are fixed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch
from ..modes import same_buffers
from ..problem import BilevelProblem, LowerProblem
from ..solution import Solution
from ..steps import Constant, Step

__all__ = ["Along", "Fixed", "Sources", "at", "moved_by", "unit_like", "with_fixed_step"]

Along = Mapping[str, Tensor]
"""A direction in θ: a tensor by parameter name; parameters that are not named do not move."""


def with_fixed_step(lower: LowerProblem, solution: Solution) -> LowerProblem:
    """The lower problem with the steps that ``solution`` was made with, whatever gradients say elsewhere."""
    if not isinstance(getattr(lower, "step", None), Step):
        return lower
    fixed = copy.copy(lower)
    object.__setattr__(fixed, "step", Constant(1 / solution.lam))
    return fixed


class Sources:
    """Where random numbers come from beside the generator that is passed: torch's global one, NumPy's, Python's.

    Args:
        device: whose global generator of torch's counts, beside the CPU's.
    """

    NAMES = ("torch's global generator", "numpy.random", "Python's random module")

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def fixed(self, moved: tuple[str, ...] = ()) -> Iterator[None]:
        """All of them seeded alike within, but for those ``moved``; they are left as they were."""
        seeds = [int(name in moved) for name in self.NAMES]
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the state that everyone shares
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                torch.default_generator.manual_seed(seeds[0])
                if self.device.type == "cuda":
                    with torch.cuda.device(self.device):
                        torch.cuda.manual_seed(seeds[0])
                np.random.seed(seeds[1])  # noqa: NPY002
                random.seed(seeds[2])
                yield
            finally:
                random.setstate(python)
                np.random.set_state(numpy)  # noqa: NPY002


@dataclass(frozen=True)
class Fixed:
    """F and its two parts near θ, with everything but θ the same in every evaluation.

    solution: what the anchor z, the targets and, of an adaptive step, the sizes are taken from.
    generator, draws: what draws are made from, and its state before the first of them.
    differentiable: whether the solve keeps its graph, as it does for solvers that differentiate it: where the network
        draws (dropout), that decides which draws the upper loss sees.
    """

    problem: BilevelProblem
    model: nn.Module
    batch: Batch
    solution: Solution
    generator: torch.Generator
    draws: Tensor
    sources: Sources
    differentiable: bool = False

    @contextmanager
    def again(self, moved: tuple[str, ...] = ()) -> Iterator[None]:
        """Everything that is drawn within is what was drawn before, and statistics are left as they were."""
        self.generator.set_state(self.draws)
        with same_buffers(self.model), self.sources.fixed(moved):
            yield

    def total(self, moved: tuple[str, ...] = ()) -> float:
        """F at the network's present θ: the mean of f(θ, δ*(θ)), every δ* solved anew."""
        with self.again(moved):
            return self.compute()

    def compute(self) -> float:
        """F, within :meth:`again`."""
        return self._loss_at(None)

    def direct(self, delta: Tensor | None = None) -> float:
        """The mean of f(θ, δ) at the network's present θ, with the δ* of :attr:`solution` if δ is not given."""
        with self.again():
            return self._loss_at(self.solution.delta if delta is None else delta)

    def implicit(self, home: Along) -> float:
        """The mean of f(θ₀, δ*(θ)) at the network's present θ, with θ₀ of ``home``."""
        with self.again():
            delta = self._solve().delta
        with self.again(), at(self.model, home):
            return self._loss_at(delta)

    def attacked(self, differentiable: bool = False) -> Solution:
        """The lower level's solution at the network's present θ."""
        with self.again():
            self.problem.upper.prepare(self.model, self.batch, self.generator)
            return self._solve(differentiable)

    def _solve(self, differentiable: bool = False) -> Solution:
        lower, z = self.problem.lower, self.solution.anchor.clone()
        return lower.solve(self.model, self._aimed(), z, self.generator, differentiable or self.differentiable)

    def _loss_at(self, delta: Tensor | None) -> float:
        upper = self.problem.upper
        seen = upper.prepare(self.model, self.batch, self.generator)
        solution = self._solve()
        if delta is not None:
            solution = replace(solution, delta=delta)
        return upper.loss_at(self.model, seen, solution, self.generator).mean().item()

    def _aimed(self) -> Batch:
        """The batch, aimed at the classes that :attr:`solution` has chosen where it chose any."""
        target = self.solution.batch.more.get("target")
        if target is None or "target" in self.batch.more or len(target) != len(self.batch):
            return self.batch
        return self.batch.replace(target=target)


@contextmanager
def at(model: nn.Module, theta: Along) -> Iterator[None]:
    """The named parameters have these values within."""
    named = dict(model.named_parameters())
    before = {name: named[name].detach().clone() for name in theta}
    try:
        _set(named, theta)
        yield
    finally:
        _set(named, before)


def _set(named: Mapping[str, nn.Parameter], theta: Along) -> None:
    with torch.no_grad():
        for name, value in theta.items():
            named[name].copy_(value)


def moved_by(model: nn.Module, along: Along, h: float) -> dict[str, Tensor]:
    """θ + h·u on the parameters that ``along`` names."""
    named = dict(model.named_parameters())
    return {name: named[name].detach() + h * u for name, u in along.items()}


def unit_like(values: Tensor) -> Tensor:
    """A random direction shaped like ``values``, of norm 1 over all of it; the same every time, on every device."""
    noise = torch.randn(values.shape, dtype=values.dtype, generator=torch.Generator().manual_seed(0))
    return (noise / noise.norm()).to(values.device)
