"""One page about runs and the results of their evaluation."""

from __future__ import annotations

from .build import report

__all__ = ["report"]
