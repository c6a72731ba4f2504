"""One tensor per training example, kept from epoch to epoch and addressed by ``batch.index``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .errors import InputError

__all__ = ["SampleMemory"]


class SampleMemory:
    """A table of rows by example. It grows to the largest index seen and knows which rows were ever written.

    Every method that takes a batch raises :class:`InputError` where it has no ``index``.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self.known: Tensor | None = None

    @staticmethod
    def rows(batch: Batch) -> Tensor:
        """``batch.index``, or an :class:`InputError` that says where it is missing."""
        if batch.index is None:
            raise InputError("this problem remembers something per example: pass Batch(x, y, index=...)")
        return batch.index

    def read(self, batch: Batch, fresh: Tensor) -> Tensor:
        """The rows of the batch, ``fresh`` ``[B, ...]`` where an example has none yet."""
        index = self.rows(batch)
        self._reserve(int(index.max()) + 1, fresh)
        assert self.values is not None and self.known is not None
        kept = self.values[index].to(fresh)
        known = self.known[index].reshape(-1, *[1] * (fresh.ndim - 1))
        return torch.where(known, kept, fresh)

    def write(self, batch: Batch, values: Tensor) -> None:
        """Keep ``values`` ``[B, ...]``, detached."""
        index = self.rows(batch)
        self._reserve(int(index.max()) + 1, values)
        assert self.values is not None and self.known is not None
        self.values[index] = values.detach().to(self.values)
        self.known[index] = True

    def clear(self) -> None:
        """Forget everything."""
        self.values = self.known = None

    def _reserve(self, n: int, like: Tensor) -> None:
        if self.values is None or self.known is None:
            self.values = torch.zeros((n, *like.shape[1:]), dtype=like.dtype, device=like.device)
            self.known = torch.zeros(n, dtype=torch.bool, device=like.device)
        elif n > len(self.values):
            more = n - len(self.values)
            more = max(more, len(self.values) // 2)
            grown = self.values.new_zeros((more, *self.values.shape[1:]))
            self.values = torch.cat([self.values, grown])
            self.known = torch.cat([self.known, self.known.new_zeros(more)])

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "known": self.known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values, self.known = (None if t is None else t.clone() for t in (state["values"], state["known"]))
