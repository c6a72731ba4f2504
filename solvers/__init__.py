"""The three couplings of the two players: each little more than its adjoint."""

from __future__ import annotations

from typing import Literal

from .full_kkt import FullKKT
from .hessian_free_kkt import HessianFreeKKT
from .zero_ig import ZeroIG

__all__ = ["SOLVERS", "FullKKT", "HessianFreeKKT", "SolverName", "ZeroIG"]

SolverName = Literal["zero-ig", "hessian-free-kkt", "full-kkt"]

SOLVERS: dict[str, type[ZeroIG] | type[HessianFreeKKT] | type[FullKKT]] = {
    "zero-ig": ZeroIG,
    "hessian-free-kkt": HessianFreeKKT,
    "full-kkt": FullKKT,
}
