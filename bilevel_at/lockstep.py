"""Decisions and errors that are alike on every process which shares a batch.

A process that stops, or raises, alone leaves the others waiting for its part of a sum. Where this process has the whole
batch, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import shares
from .errors import BilevelError, ConvergenceError, CurvatureError

__all__ = ["anywhere", "everyones", "largest", "places", "raised_alike", "rows_of_all", "smallest", "worst"]

T = TypeVar("T")


def anywhere(flag: bool) -> bool:
    """Whether ``flag`` is true on any process that shares the batch."""
    return worst(int(flag)) > 0


def worst(level: int) -> int:
    """The largest ``level`` of the processes that share the batch; it travels through the CPU."""
    if shares.current() is None:
        return level
    return int(largest(torch.tensor(level, device="cpu")))


def largest(values: Tensor) -> Tensor:
    """The largest of each value over the processes that share the batch; without a graph."""
    return values if shares.current() is None else shares.summed(values, dist.ReduceOp.MAX)


def smallest(values: Tensor) -> Tensor:
    """The smallest, likewise."""
    return values if shares.current() is None else shares.summed(values, dist.ReduceOp.MIN)


def rows_of_all(rows: int) -> int:
    """The number of rows that the whole batch has where this process has ``rows``, or losses likewise."""
    share = shares.current()
    return rows if share is None else rows * share.whole // len(share.rows)


def places(samples: list[int], rows: int) -> list[int]:
    """The places in the whole batch of some of this process's ``rows`` rows."""
    share = shares.current()
    if share is None or not samples:
        return samples
    times = max(rows // len(share.rows), 1)  # several rows for each example stand side by side
    own = share.rows.tolist()
    return [own[i // times] * times + i % times for i in samples]


def everyones(samples: list[int], rows: int) -> list[int]:
    """:func:`places` of all processes, in order; every process has to call it."""
    if shares.current() is None:
        return samples
    return sorted({place for part in shares.gathered(places(samples, rows)) for place in part})


def raised_alike(function: Callable[[], T]) -> T:
    """What ``function`` returns; a :class:`BilevelError` of one process is raised on all that share the batch.

    Sums over processes within ``function`` must not follow a line that raises on some processes alone.
    """
    if shares.current() is None or torch.compiler.is_compiling():  # a compiled graph raises nothing by values
        return function()
    own, result = None, None
    try:
        result = function()
    except BilevelError as error:
        own = error
    if anywhere(own is not None):
        raised = shares.gathered(None if own is None else (type(own).__name__, str(own), own.samples))
        errors = [error for error in raised if error is not None]
        name, message, _ = errors[0]
        kind = {"ConvergenceError": ConvergenceError, "CurvatureError": CurvatureError}.get(name, BilevelError)
        raise kind(message, sorted({place for *_, samples in errors for place in samples})) from own
    return result  # type: ignore[return-value]  # there was no error
