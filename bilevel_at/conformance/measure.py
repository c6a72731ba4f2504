"""Runs every method of every library at hand on every problem, and keeps its error and its products."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import ours, with_betty, with_boat, with_hypertorch, with_jaxopt
from .method import Library, Method, Missing
from .problems import Array, Problem, problems
from .tally import Tally

__all__ = ["EXACT", "LIBRARIES", "Conformance", "Point", "Row", "measure", "relative_error"]

LIBRARIES: dict[str, Callable[[], Library]] = {
    "bilevel-at": ours.library,
    "hypertorch": with_hypertorch.library,
    "JAXopt": with_jaxopt.library,
    "Betty": with_betty.library,
    "BOAT": with_boat.library,
}
"""Name -> what imports it, and raises :class:`Missing` where it is not installed."""

EXACT = 1e-10
"""The relative error below which a hypergradient counts as exact: rounding, times the condition of the problems."""


@dataclass(frozen=True)
class Point:
    """One hypergradient: the setting's value, ‖G − dF/dθ‖/‖dF/dθ‖, and what it took; ``failure`` where it raised."""

    value: float
    error: float
    products: int
    gradients: int
    failure: str = ""


@dataclass(frozen=True)
class Row:
    """A method on a problem, from its cheapest setting to its best."""

    problem: str
    library: str
    method: str
    setting: str
    exact: bool
    note: str
    points: tuple[Point, ...]

    @property
    def last(self) -> Point:
        """At the best setting."""
        return self.points[-1]

    def within(self, products: int) -> Point | None:
        """The best setting that takes no more products than these; None where each takes more."""
        affordable = [point for point in self.points if point.products <= products]
        return affordable[-1] if affordable else None

    def products_to(self, error: float) -> int | None:
        """The products of the first setting from which on the error stays below ``error``; None where it does not."""
        needed = None
        for point in reversed(self.points):
            if not point.error <= error:  # also where it is NaN
                break
            needed = point.products
        return needed


@dataclass(frozen=True)
class Conformance:
    """Everything that was measured.

    rows: by problem, then by library.
    problems: name -> formula.
    versions: distribution -> version, of the libraries at hand.
    missing: library -> how to get it.
    without: library -> what it does not take.
    """

    rows: tuple[Row, ...]
    problems: dict[str, str]
    versions: dict[str, str]
    missing: dict[str, str]
    without: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain values only; errors that are not finite are None."""
        content = asdict(self)
        for row in content["rows"]:
            for point in row["points"]:
                point["error"] = point["error"] if np.isfinite(point["error"]) else None
        return content


def relative_error(problem: Problem, gradient: Array) -> float:
    """‖G − dF/dθ‖ / ‖dF/dθ‖."""
    exact = problem.hypergradient
    return float(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))


def measure(
    names: Sequence[str] = tuple(LIBRARIES), progress: Callable[[str], object] = lambda text: None
) -> Conformance:
    """Run the named libraries; those that are not installed are named in ``missing``.

    Args:
        names: some of :data:`LIBRARIES`.
        progress: told what is about to run.
    """
    libraries, missing = [], {}
    for name in names:
        progress(f"importing {name}")
        try:
            libraries.append(LIBRARIES[name]())
        except Missing as why:
            missing[name] = str(why)
    rows = []
    for problem in problems():
        for library in libraries:
            for method in library.methods(problem):
                progress(f"{problem.name}: {library.name}, {method.name}")
                points = tuple(_point(problem, method, value) for value in method.settings)
                rows.append(
                    Row(problem.name, library.name, method.name, method.setting, method.exact, method.note, points)
                )
    return Conformance(
        tuple(rows),
        {problem.name: problem.formula for problem in problems()},
        {name: version for library in libraries for name, version in library.versions.items()},
        missing,
        {library.name: library.note for library in libraries if library.note},
    )


def _point(problem: Problem, method: Method, value: float) -> Point:
    tally = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of torch and JAX that other libraries meet
        try:
            gradient = method.hypergradient(problem, value, tally)
        except Exception as error:  # another library's failure is a result
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
            return Point(value, float("nan"), tally.products, tally.gradients, failure)
    return Point(value, relative_error(problem, gradient), tally.products, tally.gradients)
