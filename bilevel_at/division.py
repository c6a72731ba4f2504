"""Work that consists of many parts, such as the batches of an evaluation, divided over the processes of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from . import shares
from .errors import InputError

__all__ = ["agree", "divided"]

Part = TypeVar("Part")
T = TypeVar("T")


def divided(function: Callable[[Part], T], parts: Iterable[Part]) -> list[T]:
    """``[function(part) for part in parts]`` on every process; each computes every N-th of them, by itself.

    Every process goes through all of ``parts``, so that what is drawn for one part after the other is what one process
    draws. Where ``function`` or ``parts`` raises on one process, this raises on every process.

    Args:
        function: what is computed. Its results are tensors and plain values, alone or in tuples.
        parts: what is divided, the same on every process.

    Returns:
        The results in the order of the parts. Those of several processes have their tensors on the CPU.

    Raises:
        Elsewhere: where another process has raised an error; that one raises the error itself.
    """
    if shares.count() == 1:
        return [function(part) for part in parts]
    own = _own(function, parts)
    message = None if own.error is None else f"{type(own.error).__name__}: {own.error}"
    outcomes = shares.gathered((message, own.number, own.results))
    failed = next((rank for rank, (message, *_) in enumerate(outcomes) if message is not None), None)
    if failed is not None:
        if own.error is not None and (own.of_parts or failed == shares.rank()):
            raise own.error
        raise shares.Elsewhere(outcomes[failed][0])
    _check_equal("the number of parts of some work", [number for _, number, _ in outcomes])
    return [outcomes[place % len(outcomes)][2][place // len(outcomes)] for place in range(own.number)]


@dataclass(frozen=True)
class _Own(Generic[T]):
    """What this process has computed.

    number: of all parts, where there is no error.
    results: of its own parts.
    error: what was raised.
    of_parts: whether going through the parts raised it, which then all processes have.
    """

    number: int
    results: list[T]
    error: Exception | None = None
    of_parts: bool = False


def _own(function: Callable[[Part], T], parts: Iterable[Part]) -> _Own[T]:
    rank, count = shares.rank(), shares.count()
    number, results = 0, []
    try:
        with shares.alone():
            for part in parts:
                if number % count == rank:
                    try:
                        results.append(_on_cpu(function(part)))
                    except Exception as error:
                        return _Own(number, [], error)
                number += 1
    except Exception as error:
        return _Own(number, [], error, of_parts=True)
    return _Own(number, results)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # of a view on a CPU, all that it is a view of would be sent
    if isinstance(value, tuple):
        moved = [_on_cpu(part) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def agree(what: str, value: Any) -> None:
    """Check that the processes all have the same value.

    Args:
        what: the value in words, for the message.
        value: anything that can be compared and sent.

    Raises:
        InputError: on the first process, and :class:`~bilevel_at.shares.Elsewhere` on the others.
    """
    _check_equal(what, shares.gathered(value))


def _check_equal(what: str, values: list[Any]) -> None:
    if any(value != values[0] for value in values):
        message = (
            f"{what} is not the same on all {len(values)} processes; each needs the same network and the same data"
        )
        raise InputError(message) if shares.rank() == 0 else shares.Elsewhere(message)
