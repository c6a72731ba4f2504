"""Conversion of radii from and to text: ``8/255``, or ``0.2``."""

from __future__ import annotations

__all__ = ["in_255ths", "number_from_text", "radius_text"]


def in_255ths(epsilon: float) -> int | None:
    """k where ε is k/255 and not a number of at most three decimals (0.2 is 51/255, but is written 0.2)."""
    k = round(255 * epsilon)
    return k if k and abs(255 * epsilon - k) < 1e-4 and abs(round(epsilon, 3) - epsilon) > 1e-6 else None


def radius_text(epsilon: float) -> str:
    """A radius as text: ``8/255``, or ``0.2``."""
    k = in_255ths(epsilon)
    return f"{epsilon:.4g}" if k is None else f"{k}/255"


def number_from_text(text: str) -> float:
    """A decimal number or a fraction such as 8/255."""
    parts = text.split("/")
    try:
        if len(parts) == 2:
            return float(parts[0]) / float(parts[1])
        return float(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number (0.03 and 8/255 are)") from None
