"""The errors this library raises on purpose, and the validators that raise them: one line each, with what is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

__all__ = [
    "BilevelError",
    "ConvergenceError",
    "CurvatureError",
    "InputError",
    "at_least",
    "finite",
    "name_samples",
    "one_of",
    "positive",
    "printable",
    "reason",
    "shown",
    "whole_number",
]


class InputError(ValueError):
    """An argument cannot be used: the message names the value and what would be right."""


class BilevelError(RuntimeError):
    """A bilevel problem cannot be solved as stated.

    samples: positions in the batch that it fails on.
    """

    def __init__(self, message: str, samples: Sequence[int] = ()) -> None:
        self.samples = tuple(samples)
        super().__init__(message)


class ConvergenceError(BilevelError):
    """An iteration ended before its tolerance was reached."""


class CurvatureError(BilevelError):
    """The lower level's Hessian is not positive definite on the free directions, so dδ*/dθ does not exist."""


def shown(value: Any, most: int = 80) -> str:
    """A value from a file as a message shows it: its repr on one line, cut where it is long."""
    text = ascii(value) if not repr(value).isprintable() else repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def printable(text: str) -> str:
    """The text with ``?`` for what a terminal would not show as a character: a file's name may have line ends."""
    return "".join(character if character.isprintable() else "?" for character in text)


def reason(error: BaseException, most: int = 160) -> str:
    """What an error says, on one printable line, cut where it is long; the name of its type where it says nothing."""
    line = printable((str(error).strip().splitlines() or [type(error).__name__])[0])
    return line if len(line) <= most else line[: most - 1] + "…"


def name_samples(samples: Sequence[int], limit: int = 8) -> str:
    """'samples 0, 3, 5' for a message; long lists are cut."""
    shown = ", ".join(str(i) for i in samples[:limit])
    more = f" and {len(samples) - limit} more" if len(samples) > limit else ""
    return f"sample{'s' if len(samples) != 1 else ''} {shown}{more}"


def finite(name: str, value: Any, hint: str = "") -> float:
    """``value`` as a finite float, or an :class:`InputError` that names it."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}; it must be a finite number{hint}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """``value`` as a positive finite float, or an :class:`InputError` that names it."""
    if finite(name, value) <= 0:
        raise InputError(f"{name} is {value:g}; it must be a positive finite number")
    return float(value)


def at_least(name: str, value: Any, least: float = 0.0, hint: str = "") -> float:
    """``value`` as a finite float of at least ``least``, or an :class:`InputError` that names it."""
    if finite(name, value, hint) < least:
        raise InputError(f"{name} is {value:g}; it must be a finite number, at least {least:g}{hint}")
    return float(value)


def whole_number(name: str, value: Any, least: int) -> int:
    """``value`` where it is an int of at least ``least``, or an :class:`InputError` that names it."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number, at least {least}")
    return int(value)


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """``value`` where it is one of ``choices``, or an :class:`InputError` that lists them."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}; choose from {', '.join(repr(choice) for choice in choices)}")
    return str(value)
