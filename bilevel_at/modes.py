"""How passes see the model: in train or eval mode, with or without a graph, and with its buffers left alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .errors import InputError

__all__ = ["Mode", "Statistics", "attack_mode", "autocast", "full_precision", "no_graph", "same_buffers"]

Mode = Literal["train", "eval"]


@contextmanager
def no_graph() -> Iterator[None]:
    """``torch.no_grad()`` for a pass whose network is differentiated afterwards, under the same autocast.

    Autocast keeps the weights it has cast. In PyTorch up to 2.9 those cast without a graph were used again by passes
    that need one, whose gradients were lost in silence (pytorch issue 158232).
    """
    with torch.no_grad():
        yield
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        torch.clear_autocast_cache()


WRAPPERS = {
    "DistributedDataParallel": "replicas would part in silence; pass its .module, and call "
    "ba.distributed.reduce_gradients(module, len(batch)) before the optimizer's step",
    "FullyShardedDataParallel": ".grad would stay None in silence; pass a network that each process has whole",
    "FSDPModule": ".grad would stay None in silence; pass a network that each process has whole",
}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Autocast to bfloat16 where ``precision`` is "bfloat16"; else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """No autocast: for passes that are differentiated twice, and for linear algebra on what passes gave.

    Without autocast this does nothing, on any device.
    """
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def check_unwrapped(model: nn.Module) -> None:
    """Raise :class:`InputError` where the network is wrapped for hooks that hypergradients do not call."""
    for kind in type(model).__mro__:
        if kind.__name__ in WRAPPERS:
            raise InputError(
                f"the network is a {kind.__name__}, whose hooks hypergradients do not call: {WRAPPERS[kind.__name__]}"
            )


@contextmanager
def attack_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Put ``model`` in ``mode``; on leaving, however that happens, every submodule is as it was.

    Each submodule's own flag is restored, so deliberately frozen layers stay frozen. Several threads may be inside with
    one network: those of the same mode together, and one of another mode when they have left.

    Raises:
        InputError: for another mode, and where a thread that is inside wants the other mode beside other threads.
    """
    if mode not in get_args(Mode):
        raise InputError(f"mode {mode!r} is not known; attack passes see the model in 'train' or 'eval' mode")
    if torch.compiler.is_compiling():  # a lock is no part of a graph
        before = _switch(model, mode)
        try:
            yield
        finally:
            _restore(before)
        return
    thread = threading.get_ident()  # a generator may be closed by another one
    level = _enter(model, mode, thread)
    try:
        yield
    finally:
        _leave(model, level, thread)


Flags = list[tuple[nn.Module, bool]]


def _switch(model: nn.Module, mode: Mode) -> Flags:
    """Put the network in the mode; its modules' flags before."""
    before = [(module, module.training) for module in model.modules()]
    model.train(mode == "train")
    return before


def _restore(before: Flags) -> None:
    for module, training in before:
        module.training = training


class _Level:
    """A network in a mode, the flags that its modules had before, and how often each thread is inside."""

    def __init__(self, model: nn.Module, mode: Mode) -> None:
        self.mode, self.before = mode, _switch(model, mode)
        self.threads: dict[int, int] = {}


LONGEST_WAIT = 600.0  # seconds; two threads that wait for each other would otherwise do so in silence
_left = threading.Condition()
_levels: WeakKeyDictionary[nn.Module, list[_Level]] = WeakKeyDictionary()


def _enter(model: nn.Module, mode: Mode, me: int) -> _Level:
    """The level that thread ``me`` is inside now: its own within those it had, or one shared with other threads."""
    with _left:
        while True:
            levels = _levels.setdefault(model, [])
            if all(level.threads.keys() == {me} for level in levels):
                levels.append(_Level(model, mode))
                break
            if len(levels) == 1 and levels[0].mode == mode:
                break
            if any(me in level.threads for level in levels):
                raise InputError(
                    f"another thread uses this network in {levels[-1].mode} mode, and here it is to be in {mode} mode "
                    "within that; give each thread a copy of its own"
                )
            if not _left.wait(LONGEST_WAIT):
                raise InputError(
                    f"this network has been in {levels[-1].mode} mode in another thread for {LONGEST_WAIT:g} s, and "
                    f"here it is to be in {mode} mode; give each thread a copy of its own"
                )
        levels[-1].threads[me] = levels[-1].threads.get(me, 0) + 1
        return levels[-1]


def _leave(model: nn.Module, level: _Level, me: int) -> None:
    with _left:
        if me not in level.threads:  # a forked process, where that thread is not
            return
        level.threads[me] -= 1
        if not level.threads[me]:
            del level.threads[me]
        if not level.threads:
            _levels[model].remove(level)
            _restore(level.before)
            _left.notify_all()


def _only_this_thread() -> None:
    """In a forked process: the other threads, which are not there, are inside no more, and hold no lock."""
    global _left
    _left = threading.Condition()
    me = threading.get_ident()
    for levels in _levels.values():
        for level in reversed(list(levels)):
            level.threads = {thread: times for thread, times in level.threads.items() if thread == me}
            if not level.threads:
                levels.remove(level)
                _restore(level.before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_only_this_thread)


class Statistics:
    """The running statistics that attack passes in eval mode have seen, for the passes that differentiate the attack.

    Between the two, the upper loss moves them where the network is in train mode, and PyTorch does not notice:
    differentiating a graph that has read them gives another derivative, without an error.

    Args:
        model: the network, in its own mode; None where nothing is to be kept. Only modules in train mode move theirs.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._buffers: list[Tensor] = []
        # A compiled graph has read their values, not the buffers.
        if model is not None and not torch.compiler.is_compiling():
            self._buffers = [
                buffer.data
                for module in model.modules()
                if module.training
                for buffer in module.buffers(recurse=False)
                if buffer.is_floating_point()
            ]
        self._values = [buffer.clone() for buffer in self._buffers]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within, they have these values; afterwards those they had before."""
        if not self._buffers:
            yield
            return
        now = [buffer.clone() for buffer in self._buffers]
        torch._foreach_copy_(self._buffers, self._values)
        try:
            yield
        finally:
            torch._foreach_copy_(self._buffers, now)


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """On leaving, the model's buffers (the running statistics of batch normalisation) have their values again."""
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            # Through .data: a graph that has saved the buffer must not find it changed.
            buffer.data.copy_(value)
            setattr(module, name, buffer)  # a pass may have put another tensor in its place
