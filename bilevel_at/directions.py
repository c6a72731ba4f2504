"""Directions D(∇_δ ℓ_atk): how a linearised attacker reads the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .batch import per_sample
from .errors import InputError

__all__ = ["Direction", "direction_of", "normalized", "sign", "taylor"]


@dataclass(frozen=True)
class Direction:
    """A map of gradients ``[B, ...]`` to directions ``[B, ...]``.

    piecewise_constant: its derivative is zero almost everywhere, so that the cross derivative of g is too, and no
    graph has to be kept.
    """

    name: str
    function: Callable[[Tensor], Tensor] = field(repr=False)
    piecewise_constant: bool = False

    def __call__(self, gradient: Tensor) -> Tensor:
        return self.function(gradient)


def _normalize(gradient: Tensor) -> Tensor:
    norm = gradient.flatten(1).norm(dim=1)
    return gradient / per_sample(norm.clamp(min=1e-12), gradient)


def _sign(gradient: Tensor) -> Tensor:
    return gradient.detach().sign()


def _identity(gradient: Tensor) -> Tensor:
    return gradient


sign = Direction("sign", _sign, piecewise_constant=True)
taylor = Direction("taylor", _identity)
normalized = Direction("normalized", _normalize)

_NAMED = {d.name: d for d in (sign, taylor, normalized)}


def direction_of(direction: Direction | str) -> Direction:
    """The direction itself, or the one of that name: "sign" (ℓ∞ steepest descent), "taylor" (the gradient itself),
    "normalized" (∇/‖∇‖₂, ℓ2 steepest descent)."""
    if isinstance(direction, Direction):
        return direction
    if direction not in _NAMED:
        raise InputError(f"direction {direction!r} is not known; choose from {', '.join(_NAMED)}, or pass a Direction")
    return _NAMED[direction]
