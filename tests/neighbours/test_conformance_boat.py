"""BOAT beside closed forms: conjugate gradients and the series are exact."""

from __future__ import annotations

import pytest

pytest.importorskip("boat_torch", reason="pip install --no-deps boat-torch higher")

from bilevel_at.conformance.measure import EXACT, measure


def test_it_is_exact_where_it_applies():
    rows = measure(["BOAT"]).rows
    assert {row.problem for row in rows} == {"quadratic", "ridge", "Poisson"}
    assert {row.method for row in rows} == {"CG", "NS"}
    assert [row for row in rows if not row.last.error < EXACT] == []
