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
    assert {row.method for row in rows} == {"CG", "CG_normaleq", "fixed_point"}
    assert [row for row in rows if not row.last.error < EXACT] == []
