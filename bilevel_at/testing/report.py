"""What a check measures: directions, shares, and what is wrong, if anything is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..solution import Gradients
from .fixed import Along

__all__ = ["DegenerateActivity", "Direction", "HypergradError", "HypergradReport", "VacuousCheck"]


class HypergradError(AssertionError):
    """A hypergradient does not agree with finite differences, or the problem does not let it be checked.

    cause: its name among :data:`~bilevel_at.testing.CAUSES`.
    report: the :class:`HypergradReport`.
    """

    def __init__(self, message: str, report: HypergradReport) -> None:
        super().__init__(message)
        self.report, self.cause = report, report.cause


class VacuousCheck(HypergradError):
    """The implicit term is too small here for an error in it to be seen; hypothesis tests may ``reject()`` it."""


class DegenerateActivity(AssertionError):
    """δ* sits where a constraint is about to become active or inactive, so F is not differentiable there."""


@dataclass(frozen=True)
class Direction:
    """The derivative of F along one direction in θ, by the solver and by differences.

    name: the parameter that moves, or what the direction is made of.
    along: the direction, a unit vector over all parameters.
    analytic, numeric: the two derivatives.
    uncertainty: of ``numeric``: by how much differences of two lengths differ.
    allowed: rtol · ‖dF/dθ‖ + atol.
    """

    name: str
    along: Along = field(repr=False)
    analytic: float
    numeric: float
    uncertainty: float
    allowed: float

    @property
    def gap(self) -> float:
        """|analytic − numeric|, inf where one is not finite."""
        gap = abs(self.analytic - self.numeric)
        return gap if math.isfinite(gap) else math.inf

    @property
    def agrees(self) -> bool:
        return self.gap <= self.allowed

    @property
    def settled(self) -> bool:
        """Whether the differences themselves agree well enough to tell."""
        return not math.isfinite(self.gap) or self.uncertainty <= max(self.allowed, self.gap / 3)


@dataclass(frozen=True)
class HypergradReport:
    """The outcome of a check.

    passed: whether it passes.
    solver: the solver's class.
    directions: every direction that was tried.
    norm: ‖dF/dθ‖₂ of the solver.
    rtol: as it was asked for.
    free: the share of dimensions in which δ* may move without leaving an active constraint; None where that is not
        known.
    implicit_share: ‖implicit term‖ / ‖dF/dθ‖, by the implicit function theorem; None where δ* does not depend on θ by
        what the lower problem says.
    cause: of a failure, its name among :data:`~bilevel_at.testing.CAUSES`.
    explanation: of a failure, in a sentence or two.
    """

    passed: bool
    solver: str
    directions: tuple[Direction, ...]
    norm: float
    rtol: float
    free: float | None
    implicit_share: float | None
    cause: str | None
    explanation: str

    @property
    def worst(self) -> Direction | None:
        """The direction with the largest gap; of those that fail, one along a parameter where there is one."""
        failing = [d for d in self.directions if not d.agrees] or list(self.directions)
        along_parameters = [d for d in failing if len(d.along) == 1 and d.name in d.along]
        return max(along_parameters or failing, key=lambda d: d.gap, default=None)

    def raise_for_failure(self) -> None:
        """Raise :class:`HypergradError`, or its :class:`VacuousCheck`, unless the check has passed."""
        if not self.passed:
            kind = VacuousCheck if self.cause == "vacuous" else HypergradError
            raise kind(str(self), self)

    def __str__(self) -> str:
        worst = self.worst
        lines = []
        if worst is not None and not worst.agrees:
            lines.append(
                f"{self.solver} disagrees with finite differences, most in {worst.name}: analytic "
                f"{worst.analytic:.10g}, numeric {worst.numeric:.10g}, difference {worst.gap:.3g}, allowed "
                f"{worst.allowed:.3g} (rtol {self.rtol:g} × norm {self.norm:.3g})"
            )
        if self.cause is not None:
            lines.append(f"{self.cause}: {self.explanation}")
        if self.passed and worst is not None:
            lines.append(
                f"{self.solver} agrees with finite differences along {len(self.directions)} directions: at most "
                f"{worst.gap:.3g} apart in {worst.name}, allowed {worst.allowed:.3g}"
            )
        lines.append(self._shares())
        return "\n".join(line for line in lines if line)

    def _shares(self) -> str:
        parts = []
        if self.free is not None:
            parts.append(f"{100 * self.free:.3g} % of the directions of δ* are free")
        if self.implicit_share is not None:
            parts.append(f"the implicit term is {100 * self.implicit_share:.3g} % of the hypergradient")
        return "(" + "; ".join(parts) + ")" if parts else ""


def dot(gradients: Gradients, along: Along) -> float:
    """⟨gradients, along⟩, a gradient that is None counting as 0."""
    total = 0.0
    for name, unit in along.items():
        gradient = gradients.get(name)
        if gradient is not None:
            total += (gradient.detach() * unit).sum().item()
    return total


def difference(a: Gradients, b: Gradients) -> dict[str, Tensor | None]:
    """a − b by parameter name, a gradient that is None counting as 0."""
    out: dict[str, Tensor | None] = {}
    for name in {**a, **b}:
        one, other = a.get(name), b.get(name)
        out[name] = one if other is None else (-other if one is None else one - other)
    return out


def norm_of(gradients: Mapping[str, Tensor | None]) -> float:
    """The Euclidean norm over all parameters."""
    norms = [g.detach().norm() for g in gradients.values() if g is not None]
    return torch.stack(norms).norm().item() if norms else 0.0
