"""Without betty-ml, importing its bridge says how to get it."""

from __future__ import annotations

import sys

import pytest


def test_importing_the_bridge_without_betty_is_one_line_that_says_how_to_get_it(monkeypatch):
    for name in list(sys.modules):
        if name == "betty" or name.startswith(("betty.", "bilevel_at.interop.betty")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "betty", None)
    with pytest.raises(ImportError) as raised:
        import bilevel_at.interop.betty  # noqa: F401
    line = str(raised.value)
    assert "\n" not in line and line.startswith("bilevel_at.interop.betty needs betty-ml")
    assert "on Python 3.10, pip install betty-ml==0.2.1" in line
    assert "pip install --ignore-requires-python betty-ml==0.2.1" in line
