"""Counts what a hypergradient costs in torch, whichever library computes it: δ goes through :func:`counted` in g."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Tally", "counted"]


@dataclass
class Tally:
    """products: passes back through ∇_δ g, each a product with ∇²_δδ g, ∇²_δθ g or both at once.
    gradients: passes back through g to δ, those of products with ∇²_δδ g among them.
    """

    products: int = 0
    gradients: int = 0


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, delta: Tensor, tally: Tally) -> Tensor:
        ctx.tally = tally
        return delta.view_as(delta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.tally.gradients += 1
        return _Gradient.apply(gradient, ctx.tally), None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, tally: Tally) -> Tensor:
        ctx.tally = tally
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> Any:
        ctx.tally.products += 1
        return adjoint, None


def counted(delta: Tensor, tally: Tally) -> Tensor:
    """δ itself, whose gradients, and their derivatives, are counted in ``tally``."""
    result: Tensor = _Value.apply(delta, tally)
    return result
