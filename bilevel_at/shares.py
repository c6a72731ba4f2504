"""Several processes that train together: who they are, and what each has of a batch.

Within :func:`together`, code runs on every process alike. A batch of the run is dealt out: each process computes with
its own rows, in :func:`sharing`, and what is one number, gradient or draw of the whole batch is made so here. In one
process, and outside :func:`together`, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError

__all__ = [
    "Elsewhere",
    "Share",
    "alike",
    "alone",
    "count",
    "current",
    "deal",
    "first",
    "gathered",
    "group",
    "interleaved",
    "mean",
    "owned",
    "part",
    "rank",
    "sharing",
    "size",
    "summed",
    "summed_with_graph",
    "together",
    "total",
    "whole",
]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Share:
    """The rows of a batch that this process has.

    Args:
        rows: ``[b]``, their places in the whole batch, on its device; of a process without any, one to stand in.
        whole: the number of examples of the whole batch.
        by_index: whether example i of the training set is always with process i mod N; else place p of each batch is
            with process p mod N.
        idle: whether the row is only to stand in: passes are made, because other processes wait for their collectives,
            and nothing of it counts.
    """

    rows: Tensor
    whole: int
    by_index: bool
    idle: bool = False

    def to(self, device: torch.device) -> Share:
        return replace(self, rows=self.rows.to(device))

    @property
    def fraction(self) -> float:
        """The share of the whole batch that this process has."""
        return 0.0 if self.idle else len(self.rows) / self.whole

    def of(self, values: Tensor) -> Tensor:
        """This process's rows of ``values`` ``[whole · k, ...]``, k for each example, side by side."""
        k = len(values) // self.whole
        return values.reshape(self.whole, k, *values.shape[1:])[self.rows].flatten(0, 1)

    def times(self, rows: int) -> int:
        """How many of ``rows`` each example has.

        Raises:
            InputError: where they are not the same number for each.
        """
        if rows % len(self.rows):
            raise InputError(
                f"{rows} rows are drawn for a batch of {len(self.rows)} examples, which are a part of a batch of "
                f"{self.whole}: what all examples share is to be drawn in bilevel_at.shares.alike()"
            )
        return rows // len(self.rows)


_rank, _count = 0, 1
_group: dist.ProcessGroup | None = None
_share: Share | None = None


def rank() -> int:
    """The number of this process, from 0; 0 outside :func:`together`."""
    return _rank


def count() -> int:
    """The number of processes; 1 outside :func:`together`."""
    return _count


def group() -> dist.ProcessGroup | None:
    """The processes; None for all of the job."""
    return _group


def current() -> Share | None:
    """What this process has of the batch at hand; None where it has all of it."""
    return _share


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """What is inside runs on every process of the group alike, and divides what can be divided.

    Every process has to go through the same calls in the same order: training steps, evaluations and states that
    are saved wait for each other. Without a process group of torch.distributed, or with one process, nothing changes.

    Args:
        group: the processes; all by default.
    """
    global _rank, _count, _group
    before = _rank, _count, _group
    if dist.is_available() and dist.is_initialized():
        _rank, _count, _group = dist.get_rank(group), dist.get_world_size(group), group
    try:
        yield
    finally:
        _rank, _count, _group = before


@contextmanager
def alone() -> Iterator[None]:
    """What is inside runs on this process, as if there were no others."""
    global _rank, _count, _group, _share
    before = _rank, _count, _group, _share
    _rank, _count, _group, _share = 0, 1, None, None
    try:
        yield
    finally:
        _rank, _count, _group, _share = before


@contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """The batch at hand is one that this process has a share of."""
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


def alike() -> Any:
    """A context in which every process draws and computes the same, on what is not rows of the batch."""
    return sharing(None)


def deal(batches: Sequence[Tensor], by_index: bool) -> Sequence[Share | None]:
    """This process's share of each batch; None where there is one process.

    Args:
        batches: the examples of each, ``[B]``, positions in the training set.
        by_index: as :class:`Share` has it. The positions are then looked at, once for all batches; rows are on the CPU.
    """
    if _count == 1:
        return [None] * len(batches)
    lengths = [len(index) for index in batches]
    if by_index:
        owners = (torch.cat(list(batches)).cpu() % _count).split(lengths)
        rows = [(owner == _rank).nonzero().flatten() for owner in owners]
    else:
        rows = [torch.arange(length)[_rank::_count] for length in lengths]
    return [
        Share(mine if len(mine) else mine.new_zeros(1), length, by_index, len(mine) == 0)
        for mine, length in zip(rows, lengths, strict=True)
    ]


def size(batch: Any) -> int:
    """The number of examples of the whole batch."""
    return len(batch) if _share is None else _share.whole


def mean(losses: Tensor) -> Tensor:
    """The mean of ``[B]`` over the whole batch, as far as this process's rows make it up: the parts add up to it.

    One number is taken for a mean over the rows.
    """
    if _share is None:
        return losses.mean()
    return losses.mean() * _share.fraction


def part(number: Tensor) -> Tensor:
    """This process's part of a number that every process has computed of the whole batch; the parts add up to it."""
    return number if _share is None else number * _share.fraction


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes that share a batch, of those with rows in it; without a graph."""
    if _share is None:
        return tensor
    return summed(torch.zeros_like(tensor) if _share.idle else tensor)


def whole(values: Tensor) -> Tensor:
    """``[B, ...]`` of the whole batch from each process's rows, with a graph that can be differentiated twice.

    What each process differentiates adds up: its gradient is that of the sum of all processes' results.
    """
    share = _share
    if share is None:
        return values
    placed = values.new_zeros(share.whole, *values.shape[1:])
    return summed_with_graph(placed.index_add(0, share.rows, values))


def summed_with_graph(x: Tensor) -> Tensor:
    """Σ x over the processes that share the batch, with its graph; every process has to call it as often.

    As each process differentiates its part of one number, ``torch.autograd.grad`` on all of them together gives the
    derivative of the sum of the parts: the whole of it in what belongs to this process (its rows), this process's
    part in what all have (parameters). A process that is idle adds nothing to the sum and to no derivative of others.
    """
    share = _share
    if share is None:
        return x
    total: Tensor = _Sum.apply(x, 0.0 if share.idle else 1.0)
    return total


class _Sum(torch.autograd.Function):
    """y_r = Σ_s c_s x_s on every process r, c_s = 0 of an idle process and 1 of the others.

    Every process differentiates its own part of one sum over processes, so that x_s has the gradient Σ_r ∂/∂y_r. What
    an idle process makes of y counts for nothing either: Σ_r c_r ∂/∂y_r, with c_s before it. The gradient is this
    function again and can be differentiated as often as one likes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: float) -> Tensor:
        ctx.counts = counts
        return summed(x if counts else torch.zeros_like(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.counts) * ctx.counts, None


def summed(tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum (or another reduction) of a tensor over all processes; without a graph."""
    if _count == 1:
        return tensor
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op, group=_group)
    return result


def owned(examples: int) -> int:
    """How many of so many examples, or places, are this process's."""
    return len(range(_rank, examples, _count))


def interleaved(rows: Tensor | None) -> Tensor | None:
    """The table whose rows r, r + N, r + 2N, … process r has; on the first process, and None on the others.

    Rows of a process that has no table are zeros.
    """
    if _count == 1:
        return rows
    kinds = gathered(None if rows is None else (len(rows), rows.shape[1:], rows.dtype))
    known = [(r, kind) for r, kind in enumerate(kinds) if kind is not None]
    if not known:
        return None
    _, tail, dtype = known[0][1]
    most = max(length for _, (length, _, _) in known)
    padded = torch.zeros(most, *tail, dtype=dtype)
    if rows is not None:
        padded[: len(rows)] = rows.cpu()
    padded = padded.to(torch.uint8) if dtype == torch.bool else padded
    tables = [torch.empty_like(padded) for _ in range(_count)] if _rank == 0 else None
    dist.gather(padded, tables, _source(), group=_group)
    if tables is None:
        return None
    size = max((length - 1) * _count + r + 1 for r, (length, _, _) in known)
    return torch.stack(tables, 1).flatten(0, 1)[:size].to(dtype)


def first(function: Callable[[], T]) -> T:
    """What ``function`` returns on the first process, where it runs :func:`alone`; it is not called on the others.

    Where it raises, it does so on every process.
    """
    if _count == 1:
        return function()
    outcome: list[Any] = [None, None]
    if _rank == 0:
        try:
            with alone():
                outcome[0] = function()
        except Exception as error:
            outcome[1] = error
            _send([None, f"{type(error).__name__}: {error}"])
            raise
    return _receive(outcome)


def _send(outcome: list[Any]) -> None:
    dist.broadcast_object_list(outcome, _source(), group=_group)


def _source() -> int:
    return 0 if _group is None else dist.get_global_rank(_group, 0)


def _receive(outcome: list[Any]) -> Any:
    _send(outcome)
    if outcome[1] is not None:
        raise Elsewhere(outcome[1])
    return outcome[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if _count == 1:
        return [value]
    values: list[Any] = [None] * _count
    dist.all_gather_object(values, value, group=_group)
    return values


class Elsewhere(RuntimeError):
    """Another process has failed, and says so itself."""
