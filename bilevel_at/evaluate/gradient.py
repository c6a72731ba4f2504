"""The input gradient that checks and diagnostics look at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..losses import cross_entropy

__all__ = ["input_gradient"]


def input_gradient(model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
    """∇_x ℓ(x + δ) of the cross-entropy, each example's own, ``[B, ...]``, in the mode the model is in."""
    delta = delta.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(cross_entropy(model, batch, delta).sum(), delta)
    return gradient
