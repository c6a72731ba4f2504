"""Checks and hypothesis strategies: what this library's own property tests use, for other people's suites.

    from bilevel_at.testing import hypergradcheck
    assert hypergradcheck(problem, solver, model, batch)

``bilevel_at.testing.strategies`` needs hypothesis (``pip install 'bilevel-at[test]'``).
"""

from __future__ import annotations

from .check import DegenerateActivity, HypergradError, activity_margin, hypergradcheck

__all__ = ["DegenerateActivity", "HypergradError", "activity_margin", "hypergradcheck"]
