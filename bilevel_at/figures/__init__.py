"""The figures that runs, evaluations and reports leave behind."""

from __future__ import annotations

from .pictures import examples
from .training import curves

__all__ = ["curves", "examples"]
