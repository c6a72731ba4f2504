"""A loss whose first derivative is a hypergradient, and whose second is a central difference of hypergradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..solution import Hypergradient

__all__ = ["differentiable_loss"]

Compute = Callable[[], Hypergradient]


def differentiable_loss(step: Hypergradient, model: nn.Module, again: Compute) -> Tensor:
    """F with a graph in the parameters of ``model`` that require a gradient.

    Args:
        step: the hypergradient at the present parameters.
        model: the network that it was computed for.
        again: computes it at the parameters that ``model`` then has.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result: Tensor = _Value.apply(step, list(named), again, *named.values())
    return result


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Hypergradient, names: list[str], again: Compute, *parameters: Tensor) -> Tensor:
        ctx.step, ctx.names, ctx.again = step, names, again
        ctx.save_for_backward(*parameters)
        return step.loss.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        gradients = _Gradient.apply(ctx.step, ctx.names, ctx.again, *ctx.saved_tensors)
        return None, None, None, *(weight * gradient for gradient in gradients)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: Hypergradient, names: list[str], again: Compute, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.names, ctx.again, ctx.parameters = names, again, parameters
        return tuple(_dense(step, names, parameters))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *direction: Tensor) -> Any:
        """∇²F p, symmetric, as (∇F(θ + hp) − ∇F(θ − hp)) / 2h with h‖p‖ = eps^⅓ max(1, ‖θ‖)."""
        parameters = ctx.parameters
        length = torch.stack(torch._foreach_norm(direction)).norm().item()
        if length == 0:
            return None, None, None, *(torch.zeros_like(p) for p in parameters)
        size = torch.stack(torch._foreach_norm([p.detach() for p in parameters])).norm().item()
        h = torch.finfo(parameters[0].dtype).eps ** (1 / 3) * max(1.0, size) / length
        before = [p.detach().clone() for p in parameters]
        sides = []
        try:
            for side in (h, -h):
                for p, start, d in zip(parameters, before, direction, strict=True):
                    p.data.copy_(start + side * d)  # through .data: graphs that have saved it stay valid
                sides.append(_dense(ctx.again(), ctx.names, parameters))
        finally:
            for p, start in zip(parameters, before, strict=True):
                p.data.copy_(start)
        return None, None, None, *((a - b) / (2 * h) for a, b in zip(*sides, strict=True))


def _dense(step: Hypergradient, names: list[str], parameters: Any) -> list[Tensor]:
    """dF/dθ in the order of ``names``, zero where a parameter does not matter."""
    found = [step.grads[name] for name in names]
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
