"""Operations of some computation, and the most memory that it has alive at once: on any device, the meta device too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Moment", "bytes_alive", "extended", "operations", "tensors_in"]


class Moment(NamedTuple):
    """The bytes that are alive after an operation."""

    operation: str
    alive: float


class _NoModules:
    """In place of MemTracker's ModTracker, which takes a network for one that is called once, forward and backward.

    An attack calls it many times, and differentiates twice. What MemTracker tells by module is lost; the total is not.
    """

    is_bw = False
    parents: frozenset[str] = frozenset()

    def register_user_hooks(self, *hooks: Any) -> None:
        pass

    def clear_user_hooks(self) -> None:
        pass

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def operations(compute: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions and matrix products, as torch counts them.

    The counter keeps tensors alive (its hooks make cycles): memory is to be followed in another run.
    """
    from torch.utils.flop_counter import FlopCounterMode  # on demand: it takes 0.08 s, and commands import this file

    with FlopCounterMode(display=False) as counter:
        compute()
    return int(counter.get_total_flops())


class _Follow(TorchDispatchMode):
    """Notes what a MemTracker, which must be entered before, has alive after every operation."""

    def __init__(self, tracker: Any, device: torch.device) -> None:
        super().__init__()
        self.tracker, self.device = tracker, device
        self.moments: list[Moment] = []

    def note(self, operation: str) -> None:
        alive: Mapping[torch.device, Mapping[str, int]] = self.tracker.get_tracker_snapshot("current")
        total = sum(parts["Total"] for where, parts in alive.items() if where.type == self.device.type)
        self.moments.append(Moment(operation, total))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(str(func))
        return result


def bytes_alive(compute: Callable[[], Any], device: torch.device, before: Iterable[Tensor]) -> list[Moment] | None:
    """The bytes of the tensors on ``device`` that are alive after each operation, by torch's ``MemTracker``.

    What kernels take for themselves is not seen, nor what an allocator keeps in reserve.

    Args:
        compute: what is run.
        device: where its tensors are.
        before: those that there are already.

    Returns:
        None where this torch has no MemTracker (a build without ``torch.distributed``).
    """
    try:
        from torch.distributed._tools.mem_tracker import MemTracker
    except (ImportError, AttributeError):
        return None
    tracker: Any = MemTracker()
    if not hasattr(tracker, "_mod_tracker"):
        return None
    tracker._mod_tracker = _NoModules()
    tracker.track_external(*before)
    follow = _Follow(tracker, device)
    with tracker, follow:
        follow.note("before")
        compute()
    return follow.moments


def extended(more: Sequence[Moment], fewer: Sequence[Moment], times: float) -> list[Moment]:
    """more + times · (more − fewer) at each operation that both have made.

    The bytes alive after an operation are linear in the batch's examples; their maximum is so only as long as it stays
    at one operation. Where the operations differ (a loop that ends by what it sees), those before and after them are
    extended one by one, and of the rest the maxima, which gives too little rather than too much.
    """
    names = [[moment.operation for moment in moments] for moments in (more, fewer)]
    start = _common(*names)
    end = _common(*([*reversed(one[start:])] for one in names))
    between = more[start : len(more) - end], fewer[start : len(fewer) - end]
    middle = [max(part, key=lambda moment: moment.alive) for part in between if part]
    pairs = [*zip(more[:start], fewer[:start], strict=True)]
    pairs += [(middle[0], middle[-1])] if middle else []
    pairs += zip(more[len(more) - end :], fewer[len(fewer) - end :], strict=True)
    return [Moment(one.operation, one.alive + times * (one.alive - other.alive)) for one, other in pairs]


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many of the first entries are the same."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in dictionaries, lists, tuples and modules."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from (*value.parameters(), *value.buffers())
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
