"""The processes that torchrun has started, as one command: all compute, and the first reads, writes and prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .. import shares
from ..errors import BilevelError, InputError
from ..memory import is_memory
from .mistakes import one_line

__all__ = ["agreed", "joined", "leave", "line_of", "local_rank", "on_device", "one_after_the_other"]

T = TypeVar("T")
_of_a_job: list[bool] = []
CLOSED = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "gloo::", "[c10d]")


@contextmanager
def joined() -> Iterator[bool]:
    """Join the processes of this job, by the environment that torchrun sets; whether this is the first of them.

    Gradients travel by NCCL between GPUs and by gloo between CPUs; flags and objects by gloo.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        yield True
        return
    if not dist.is_available():
        raise InputError("this build of torch has no torch.distributed; start the command without torchrun")
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(local_rank() % gpus)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    is_first = dist.get_rank() == 0
    try:
        with (
            shares.together(),
            open(os.devnull, "w") as nowhere,
            nullcontext() if is_first else redirect_stdout(nowhere),
        ):
            yield is_first
    finally:
        dist.destroy_process_group()
        _of_a_job.append(True)


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def agreed(function: Callable[[], T]) -> T:
    """What ``function`` returns here; an error of one process is an error of all, and the first has the message."""
    if shares.count() == 1:
        return function()
    result: T
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:
        error = raised
    errors = shares.gathered(None if error is None or isinstance(error, shares.Elsewhere) else _message(error))
    bad = next((rank for rank, message in enumerate(errors) if message is not None), None)
    if bad is None:
        if error is not None:
            raise error
        return result
    if shares.rank() > 0:
        raise shares.Elsewhere(str(errors[bad]))
    raise error if error is not None and bad == 0 else BilevelError(f"process {bad}: {errors[bad]}")


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, (InputError, BilevelError)) else one_line(error)


def one_after_the_other(function: Callable[[], T]) -> T:
    """What ``function`` returns here, called on the first process before the others: what it downloads is there."""
    results: list[T] = []
    shares.first(lambda: results.append(function()))
    return results[0] if results else function()


def on_device(state: Any, device: torch.device) -> Any:
    """The same with its tensors on ``device``, but for memories, of which each process takes its rows first."""
    if isinstance(state, dict) and is_memory(state):
        return state
    if isinstance(state, torch.Tensor):
        return state.to(device)
    if isinstance(state, dict):
        return {key: on_device(value, device) for key, value in state.items()}
    return type(state)(on_device(value, device) for value in state) if type(state) in (list, tuple) else state


def leave(status: int) -> None:
    """End a process of a job; in a command that is one process nothing happens.

    Without C++ destructors: those of gloo's threads abort one process in some tens, after all is done.
    """
    if _of_a_job:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def line_of(error: BaseException) -> str | None:
    """An error in one line; None where it is for another process of the job to say."""
    if isinstance(error, shares.Elsewhere):
        return None
    lost = isinstance(error, RuntimeError) and any(part in str(error) for part in CLOSED)
    if _of_a_job and (lost or isinstance(error, dist.DistError)):
        # Of those that were waiting for a process that has ended, the first speaks.
        return "another process of this job has ended" if os.environ.get("RANK", "0") == "0" else None
    return one_line(error)
