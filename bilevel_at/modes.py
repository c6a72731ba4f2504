"""The mode (train or eval statistics) in which attack passes see the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch import nn

from .errors import InputError

__all__ = ["Mode", "attack_mode"]

Mode = Literal["train", "eval"]


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
