"""What the fast selection, ``pytest -m "not slow"``, leaves out of a parametrised test."""

from __future__ import annotations

import pytest
from hypothesis import settings


def fast(values, chosen):
    """The values in their order; those not chosen are marked as slow."""
    values = list(values)
    assert set(chosen) <= set(values), set(chosen) - set(values)
    return [value if value in chosen else _slow(value) for value in values]


def thorough():
    """Whether tests are to look at everything: ``pytest --hypothesis-profile thorough``."""
    return settings.default.max_examples > 50


def _slow(value):
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
