"""Numbers from files, which anyone may have written."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["number"]


def number(value: Any) -> float:
    """A finite number from a file as a float; NaN for any other value."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return math.nan
    try:
        as_float = float(value)
    except OverflowError:  # a whole number of some hundred digits
        return math.nan
    return as_float if math.isfinite(as_float) else math.nan
