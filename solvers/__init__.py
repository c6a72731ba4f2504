"""The couplings of the two players: each little more than its adjoint. docs/solvers.md compares them."""

from __future__ import annotations

from typing import Any, Literal

from .full_kkt import FullKKT
from .gauss_newton_kkt import GaussNewtonKKT
from .hessian_free_kkt import HessianFreeKKT
from .lazy import Lazy
from .neumann import Neumann
from .projection_adjoint import ProjectionAdjoint
from .value_function import ValueFunction
from .zero_ig import ZeroIG

__all__ = [
    "SOLVERS",
    "WRAPPERS",
    "FullKKT",
    "GaussNewtonKKT",
    "HessianFreeKKT",
    "Lazy",
    "Neumann",
    "PlainName",
    "ProjectionAdjoint",
    "SolverName",
    "ValueFunction",
    "ZeroIG",
]

PlainName = Literal[
    "zero-ig", "hessian-free-kkt", "full-kkt", "projection-adjoint", "neumann", "value-function", "gauss-newton-kkt"
]
"""The solvers that stand alone, by the names that ``--solver`` and ``--inner`` take."""

SolverName = Literal[
    "zero-ig",
    "hessian-free-kkt",
    "full-kkt",
    "projection-adjoint",
    "neumann",
    "value-function",
    "gauss-newton-kkt",
    "lazy",
]
"""These, and the solvers that wrap one of them."""

SOLVERS: dict[str, type[Any]] = {
    "zero-ig": ZeroIG,
    "hessian-free-kkt": HessianFreeKKT,
    "full-kkt": FullKKT,
    "projection-adjoint": ProjectionAdjoint,
    "neumann": Neumann,
    "value-function": ValueFunction,
    "gauss-newton-kkt": GaussNewtonKKT,
}
"""Their classes, by name."""

WRAPPERS: dict[str, type[Lazy]] = {"lazy": Lazy}
"""The classes of those that wrap another, by name."""
