"""Losses with one signature, ``loss(model, batch, delta) -> [B]``: one value per sample, never a mean.

Per-sample values keep input gradients independent of the batch size, so a step size means the same everywhere.
Attackers minimise: ``minus(cross_entropy)`` is the usual attack loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch import Batch
from .errors import InputError

__all__ = [
    "Loss",
    "cross_entropy",
    "kl_divergence",
    "logits",
    "margins",
    "minus",
    "negative_margin",
]

Loss = Callable[[nn.Module, Batch, Tensor], Tensor]


def logits(model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
    """f_θ(x + δ), ``[B, K]``.

    Raises :class:`InputError` where the model's output is not one row of logits per sample, or (on the CPU,
    where looking is free) has too few classes for the labels.
    """
    out = model(batch.x + delta)
    if out.ndim != 2 or len(out) != len(batch):
        raise InputError(f"the model's output has shape {tuple(out.shape)}; logits are [{len(batch)}, classes]")
    if batch.y.is_cuda or len(batch) == 0:
        return out
    try:
        low, high = int(batch.y.min()), int(batch.y.max())
    except RuntimeError:  # under vmap the labels cannot be looked at; the pass that led here has done so
        return out
    if low < 0 or high >= out.shape[1]:
        bad = low if low < 0 else high
        raise InputError(f"label {bad} is out of range: the model has {out.shape[1]} outputs, 0 … {out.shape[1] - 1}")
    return out


def cross_entropy(model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
    """−log softmax(f_θ(x + δ))_y, ``[B]``."""
    return F.cross_entropy(logits(model, batch, delta), batch.y, reduction="none")


def margins(model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
    """M_j = f_j − f_y for every class j, ``[B, K]``, with −∞ at j = y (BETA paper, equation 12).

    Positive for some j exactly where the prediction is wrong.
    """
    out = logits(model, batch, delta)
    label = batch.y[:, None]
    own = torch.arange(out.shape[1], device=out.device) == label
    return (out - out.gather(1, label)).masked_fill(own, -torch.inf)


def negative_margin(model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
    """max_{j≠y} M_j, or M_t where the batch is aimed at targets t, ``[B]``. Attackers minimise ``minus`` of it."""
    m = margins(model, batch, delta)
    return m.amax(1) if batch.target is None else m.gather(1, batch.target[:, None]).squeeze(1)


class KLDivergence:
    """KL(f_θ(x) ‖ f_θ(x + δ)), ``[B]`` (TRADES, Zhang et al., 2019, equation 5).

    Attack passes, which all see the same θ, compute log f_θ(x) once (:meth:`LowerProblem.prepare`).
    """

    def __call__(self, model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
        clean = self._reference(model, batch) if batch.reference is None else batch.reference
        moved = F.log_softmax(logits(model, batch, delta), 1)
        return F.kl_div(moved, clean, reduction="none", log_target=True).sum(1)

    def prepare(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with log f_θ(x)."""
        return replace(batch, reference=self._reference(model, batch))

    @staticmethod
    def _reference(model: nn.Module, batch: Batch) -> Tensor:
        return F.log_softmax(logits(model, batch, torch.zeros_like(batch.x)), 1)

    def __repr__(self) -> str:
        return "kl_divergence"


kl_divergence = KLDivergence()


class minus:
    """``minus(loss)(model, batch, delta)`` is ``-loss(model, batch, delta)``: what the attacker minimises."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        if hasattr(loss, "prepare"):
            self.prepare = loss.prepare

    def __call__(self, model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
        return -self.loss(model, batch, delta)

    def __repr__(self) -> str:
        return f"minus({getattr(self.loss, '__name__', self.loss)})"
