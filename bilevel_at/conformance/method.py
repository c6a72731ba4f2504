"""What a library offers to the comparison: the interface that ``ours.py`` and each ``with_*.py`` implement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .problems import Array, Problem
from .tally import Tally, counted

__all__ = ["ITERATIONS", "TERMS", "TOLERANCES", "Library", "Method", "Missing", "TorchProblem"]

ITERATIONS = (1, 2, 3, 5, 10, 15, 20, 25, 30, 40)
"""Of conjugate gradients: twice as many as δ has values."""

TERMS = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
"""Of series and fixed points: (1 − 1/30)^1280 is 1e-19."""

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-14)


class Missing(Exception):
    """A library that is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Method:
    """One way of a library to compute a hypergradient.

    name: in the library's own words.
    setting: what the values in ``settings`` are ("iterations", "tol"); "" where there is one setting.
    settings: the values tried, from cheap to exact.
    hypergradient: (problem, value of the setting, tally to count in) -> dF/dθ.
    exact: whether the last setting is to give the hypergradient to rounding.
    note: a sentence about it.
    """

    name: str
    hypergradient: Callable[[Problem, Any, Tally], Array]
    setting: str = ""
    settings: Sequence[float] = (0,)
    exact: bool = True
    note: str = ""


@dataclass(frozen=True)
class Library:
    """A library at hand.

    name: its name.
    versions: of it and of what it stands on.
    methods: problem -> the methods that take such a problem; none where it has no such constraint.
    note: a sentence about it.
    """

    name: str
    versions: Mapping[str, str]
    methods: Callable[[Problem], Sequence[Method]]
    note: str = ""


@dataclass
class TorchProblem:
    """A problem in torch, in float64, with g counted."""

    problem: Problem
    tally: Tally | None
    arrays: dict[str, Tensor] = field(init=False)
    theta: Tensor = field(init=False)
    delta: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.arrays = {name: torch.from_numpy(array) for name, array in self.problem.arrays.items()}
        self.theta = torch.from_numpy(self.problem.theta.copy())
        self.delta = torch.from_numpy(self.problem.delta.copy())

    def lower(self, theta: Tensor, delta: Tensor) -> Tensor:
        """g, one number."""
        seen = delta if self.tally is None else counted(delta, self.tally)
        value: Tensor = self.problem.lower(torch, self.arrays, theta, seen)
        return value

    def upper(self, theta: Tensor, delta: Tensor) -> Tensor:
        """f, one number."""
        value: Tensor = self.problem.upper(torch, self.arrays, theta, delta)
        return value
