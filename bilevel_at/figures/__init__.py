"""The figures of runs, evaluations and reports."""

from __future__ import annotations

from .pictures import examples
from .training import curves

__all__ = ["curves", "examples"]
