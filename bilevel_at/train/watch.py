"""A look at a number on the device, now and then, that does not wait for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..batch import on_host

__all__ = ["Watch"]


class Watch:
    """Passes numbers on to ``check``: at once from a CPU, and from a GPU when a copy has arrived.

    While a copy is on its way, further numbers are not looked at; nor are numbers on devices other than these.

    check: is called with each number that was looked at, and may raise.
    """

    def __init__(self, check: Callable[[float], None]) -> None:
        self.check = check
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def see(self, value: Tensor) -> None:
        """Look at a 0-dim tensor, or at the last one whose copy has arrived since."""
        if on_host(value):
            self.check(value.item())
        elif value.is_cuda:
            self._see_copy(value)

    def _see_copy(self, value: Tensor) -> None:
        if self._copy is not None and self._arrived is not None:
            if not self._arrived.query():
                return
            self.check(self._copy.item())
        self._copy = torch.empty((), dtype=value.dtype, pin_memory=True)
        self._copy.copy_(value.detach(), non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()
