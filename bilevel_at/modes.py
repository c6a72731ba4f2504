"""How passes see the model: in train or eval mode, with or without a graph, and with its buffers left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import nn

from .errors import InputError

__all__ = ["Mode", "attack_mode", "autocast", "full_precision", "no_graph", "same_buffers"]

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

    Each submodule's own flag is restored, so deliberately frozen layers stay frozen.
    """
    if mode not in get_args(Mode):
        raise InputError(f"mode {mode!r} is not known; attack passes see the model in 'train' or 'eval' mode")
    before = [(module, module.training) for module in model.modules()]
    model.train(mode == "train")
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


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
