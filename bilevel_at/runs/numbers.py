"""Numbers from files, which anyone may have written."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["number"]


def number(value: Any) -> float:
    """A finite number from a file as a float; NaN for any other value."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan
