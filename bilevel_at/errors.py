"""The errors this library raises on purpose, each with one line that says what would be right."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["BilevelError", "ConvergenceError", "CurvatureError", "InputError"]


class InputError(ValueError):
    """Something asked for, or handed in, is not usable: the message names the value and what would be."""


class BilevelError(RuntimeError):
    """A bilevel problem could not be solved as stated. ``samples`` are the positions in the batch."""

    def __init__(self, message: str, samples: Sequence[int] = ()) -> None:
        self.samples = tuple(samples)
        super().__init__(message)


class ConvergenceError(BilevelError):
    """An iteration ended before its tolerance was reached."""


class CurvatureError(BilevelError):
    """The lower level's Hessian is not positive definite on the free directions, so dδ*/dθ does not exist."""


def name_samples(samples: Sequence[int], limit: int = 8) -> str:
    """'samples 0, 3, 5' for a message; long lists are cut."""
    shown = ", ".join(str(i) for i in samples[:limit])
    more = f" and {len(samples) - limit} more" if len(samples) > limit else ""
    return f"sample{'s' if len(samples) != 1 else ''} {shown}{more}"
