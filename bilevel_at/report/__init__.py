"""One page about runs and what evaluation found of them."""

from __future__ import annotations

from .build import report

__all__ = ["report"]
