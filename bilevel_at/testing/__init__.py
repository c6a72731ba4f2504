"""Checks and hypothesis strategies: what this library's own property tests use, for other people's suites.

    from bilevel_at.testing import hypergradcheck
    assert hypergradcheck(problem, solver, model, batch)

``bilevel_at.testing.strategies`` needs hypothesis (``pip install 'bilevel-at[test]'``).
"""

from __future__ import annotations

import importlib
from types import ModuleType

from .causes import CAUSES
from .check import hypergradcheck, hypergradreport
from .conditions import activity_margin
from .kit import assert_feasible, assert_kkt, assert_reproducible
from .report import DegenerateActivity, HypergradError, HypergradReport, VacuousCheck

__all__ = [
    "CAUSES",
    "DegenerateActivity",
    "HypergradError",
    "HypergradReport",
    "VacuousCheck",
    "activity_margin",
    "assert_feasible",
    "assert_kkt",
    "assert_reproducible",
    "hypergradcheck",
    "hypergradreport",
]


def __getattr__(name: str) -> ModuleType:
    """``bilevel_at.testing.strategies``, imported on first use because it needs hypothesis."""
    if name == "strategies":
        return importlib.import_module(".strategies", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
