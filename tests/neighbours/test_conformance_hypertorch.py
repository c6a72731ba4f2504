"""hypertorch beside closed forms: exact with and without constraints."""

from __future__ import annotations

import pytest

pytest.importorskip(
    "hypergrad.hypergradients", reason="pip install --no-deps git+https://github.com/prolearner/hypertorch"
)

from bilevel_at.conformance.measure import EXACT, measure
from bilevel_at.conformance.problems import problems


def test_it_is_exact():
    rows = measure(["hypertorch"]).rows
    assert {row.problem for row in rows} == {problem.name for problem in problems()}
    assert {row.method for row in rows if row.exact} == {"CG", "CG_normaleq", "fixed_point"}
    assert [row for row in rows if row.exact and not row.last.error < EXACT] == []


def test_as_it_comes_it_returns_the_iterate_before_the_last():
    """Which is 0 on the problem that the first step solves: the page says so, and would have to stop."""
    found = {row.problem: row.last.error for row in measure(["hypertorch"]).rows if "as it comes" in row.method}
    assert found.pop("proximal, box") > 0.1
    assert max(found.values()) < 1e-6
