"""One row per training example, or per position in the batch, kept from batch to batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from . import shares
from .batch import Batch, on_host
from .errors import InputError, one_of

__all__ = ["SampleMemory", "is_memory"]


def is_memory(state: Mapping[str, Any]) -> bool:
    """Whether a state is, or has in it, that of a :class:`SampleMemory`."""
    return {"values", "known"} <= state.keys()


class SampleMemory:
    """A table of rows, which knows which of them were ever written.

    It is reserved as a whole where ``batch.examples`` says how many there may be. Where it does not, it grows to the
    largest row written, for which every write waits for a GPU. Of several processes that train together each has the
    rows of its own examples, or places; the state is that of all of them.

    Args:
        by: "example" addresses rows by ``batch.index``; "position" by the place in the batch.

    Raises:
        InputError: from every method that takes a batch, where rows go by example and the batch has no index.
    """

    def __init__(self, by: Literal["example", "position"] = "example") -> None:
        one_of("by", by, ("example", "position"))
        self.by = by
        self.values: Tensor | None = None
        self.known: Tensor | None = None

    def rows(self, batch: Batch, count: int) -> Tensor:
        """The rows that ``count`` values of this batch have, ``[count]``."""
        share = shares.current()
        if self.by == "position":
            if share is not None and share.by_index:
                raise InputError("something is remembered by position where batches are dealt out by example")
            return torch.arange(count, device=batch.x.device)
        if batch.index is None:
            raise InputError("this problem remembers something per example: pass Batch(x, y, index=...)")
        if count != len(batch):
            raise InputError(
                f"{count} rows cannot be remembered for {len(batch)} examples; remember what a batch shares by position"
            )
        if on_host(batch.index) and len(batch):
            low, high = int(batch.index.min()), int(batch.index.max())
            if low < 0:
                raise InputError(f"index has values down to {low}; positions count from 0")
            if batch.examples is not None and high >= batch.examples:
                raise InputError(
                    f"index has values up to {high}; with examples={batch.examples} they must be below that"
                )
        if share is None:
            return batch.index
        if not share.by_index:
            raise InputError("something is remembered by example where batches are dealt out by position")
        return torch.div(batch.index, shares.count(), rounding_mode="floor")

    def read(self, batch: Batch, fresh: Tensor) -> Tensor:
        """The rows of the batch; ``fresh`` ``[B, ...]`` where a row was never written. Changes nothing."""
        rows = self.rows(batch, len(fresh))
        self._follow(fresh.device)
        if self.values is None or self.known is None or self.values.shape[1:] != fresh.shape[1:]:
            return fresh
        # Clamped rather than looked at: asking a GPU for the largest row would wait for it.
        inside = rows < len(self.values)
        rows = rows.clamp(max=len(self.values) - 1)
        known = (self.known[rows] & inside).reshape(-1, *[1] * (fresh.ndim - 1))
        return torch.where(known, self.values[rows].to(fresh), fresh)

    def write(self, batch: Batch, values: Tensor) -> None:
        """Remember ``values`` ``[B, ...]``, detached. Rows of another shape than before replace the whole table."""
        rows = self.rows(batch, len(values))
        share = shares.current()
        if share is None and shares.count() > 1:
            raise InputError(
                "something is remembered of a batch that is not dealt out, in ba.distributed.together(): in a loop of "
                "your own leave that out, and give each example to one process"
            )
        if share is not None and share.idle:
            return
        if self.values is not None and self.values.shape[1:] != values.shape[1:]:
            self.clear()
        self._follow(values.device)
        self._reserve(self._least(batch, rows), values)
        assert self.values is not None and self.known is not None
        self.values[rows] = values.detach().to(self.values)
        self.known[rows] = True

    def clear(self) -> None:
        """Forget everything."""
        self.values = self.known = None

    def _least(self, batch: Batch, rows: Tensor) -> int:
        """How many rows the table needs for these."""
        if self.by == "position":
            return len(rows)
        return int(rows.max()) + 1 if batch.examples is None else shares.owned(batch.examples)

    def _reserve(self, n: int, like: Tensor) -> None:
        if self.values is None or self.known is None:
            self.values = torch.zeros((n, *like.shape[1:]), dtype=like.dtype, device=like.device)
            self.known = torch.zeros(n, dtype=torch.bool, device=like.device)
        elif n > len(self.values):
            more = max(n - len(self.values), len(self.values) // 2)
            self.values = torch.cat([self.values, self.values.new_zeros((more, *self.values.shape[1:]))])
            self.known = torch.cat([self.known, self.known.new_zeros(more)])

    def _follow(self, device: torch.device) -> None:
        """A table that was loaded elsewhere goes where it is used."""
        if self.values is not None and self.known is not None and self.values.device != device:
            self.values, self.known = self.values.to(device), self.known.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The table; of several processes, that of all of them on the first, and nothing on the others."""
        return {"values": shares.interleaved(self.values), "known": shares.interleaved(self.known)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; of several processes, each its own rows."""
        mine = slice(shares.rank(), None, shares.count())
        self.values, self.known = (None if t is None else t[mine].clone() for t in (state["values"], state["known"]))
