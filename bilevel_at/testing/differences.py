"""Directional derivatives by differences, with how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from .fixed import Along, at, moved_by

__all__ = ["Slope", "slope"]

STEPS = (1.0, 8.0, 1 / 8, 64.0, 1 / 64, 512.0, 4096.0)
"""Multiples of eps that are tried, nearest first. Rounding, and an iterative solve's tolerance, want a longer step;
curvature and kinks a shorter one."""


class Slope(NamedTuple):
    """A derivative, and its uncertainty: by how much estimates of different steps differ."""

    value: float
    uncertainty: float


def slope(
    value: Callable[[], float], model: nn.Module, along: Along, eps: float, expected: float, allowed: float
) -> Slope:
    """The derivative of ``value()`` as θ moves along ``along``.

    Its first estimate is (F(θ + eps·u) − F(θ − eps·u)) / 2 eps. Where that is not within ``allowed`` of ``expected``,
    Richardson's extrapolation (4 D(h/2) − D(h)) / 3 is made for several h, and the estimate is the one that differs
    least from the D(h/2) it was made from.

    Args:
        value: F, at the network's present θ.
        model: the network; its parameters are restored.
        along: u.
        eps: the first h.
        expected, allowed: what is thought to be the derivative, and the error that matters.
    """

    def central(h: float) -> float:
        ends = []
        for sign in (1, -1):
            with at(model, moved_by(model, along, sign * h)):
                ends.append(value())
        return (ends[0] - ends[1]) / (2 * h)

    first = central(eps)
    if abs(first - expected) <= allowed:
        return Slope(first, allowed)
    best = Slope(first, math.inf)
    for multiple in STEPS:
        h = multiple * eps
        long, short = first if multiple == 1 else central(h), central(h / 2)
        estimate = Slope((4 * short - long) / 3, abs(long - short))
        if not math.isfinite(estimate.value):
            return Slope(estimate.value, 0.0) if multiple == 1 else best
        if estimate.uncertainty < best.uncertainty:
            best = estimate
        if best.uncertainty <= allowed / 10:  # a smooth F: what is left of a disagreement is one
            break
    return best
