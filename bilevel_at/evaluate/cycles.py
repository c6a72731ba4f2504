"""Projected steps that go in a circle: what the last of K steps is, without taking all of them.

A projected step of fixed length is a function of δ alone, so an iterate that equals an earlier one starts a cycle. Sign
steps end in one sooner than one may think, at a corner of the ball with a pixel or two going back and forth: PGD-50 on
adversarially trained digits needs 19 gradients an image in place of 49 (docs/results/attack-time.md).
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..draws import random_state

__all__ = ["Cycles", "rows_apart"]

LONGEST = 4  # steps; nearly all cycles are of 1, 2 or 4
WORTH = 8  # rows leave when they are one in so many: each new batch size costs a preparation of kernels


class Cycles:
    """Watches the iterates of each row, and says which have returned to one of the last four.

    Args:
        steps: K, after which the iterates end.
        generator: what the steps would draw from, if they drew. Steps that draw are no function of δ, and none of their
            rows are reported; so do draws from torch's own generators, NumPy's and Python's. A generator that a network
            keeps for itself is not seen.
    """

    def __init__(self, steps: int, generator: torch.Generator) -> None:
        self.steps, self.generator = steps, generator
        self.recent: deque[Tensor] = deque(maxlen=LONGEST)
        self.sums: deque[Tensor] = deque(maxlen=LONGEST)  # of each row: those that are equal have equal ones
        self.done = 0
        self._state: list[Tensor] | None = None
        self._elsewhere: tuple[Any, ...] = ()

    def see(self, delta: Tensor) -> tuple[Tensor, Tensor] | None:
        """Take in the next iterate.

        Args:
            delta: ``[B, ...]``, for the rows that are left.

        Returns:
            (``[B]`` bool, the rows in a cycle; what their iterates after K steps are, ``[B, ...]``, meaningful in those
            rows), where there are enough of them for a smaller batch to pay, and None otherwise.
        """
        self.done += 1
        if self._state is None:
            # After the first step, which draws its start.
            self._state, self._elsewhere = random_state(self.generator), _state_elsewhere()
        sums = delta.flatten(1).sum(1)
        equal = [(sums == before).any() for before in self.sums]
        ending = self._look(delta) if equal and torch.stack(equal).any() else None
        self.recent.append(delta)
        self.sums.append(sums)
        return ending

    def keep(self, rows: Tensor) -> None:
        """Only ``rows`` (``[B]`` bool, or indices) are left."""
        self.recent = deque((delta[rows] for delta in self.recent), maxlen=LONGEST)
        self.sums = deque((sums[rows] for sums in self.sums), maxlen=LONGEST)

    def _look(self, delta: Tensor) -> tuple[Tensor, Tensor] | None:
        cycling = torch.zeros(len(delta), dtype=torch.bool, device=delta.device)
        last = delta
        for period in range(1, len(self.recent) + 1):
            back = (self.recent[-period] == delta).flatten(1).all(1) & ~cycling
            ahead = (self.steps - self.done) % period
            if ahead:  # the iterate that many steps on is the one that many steps after the equal one
                last = torch.where(back.reshape(-1, *[1] * (delta.ndim - 1)), self.recent[ahead - period], last)
            cycling |= back
        enough = int(cycling.sum()) * WORTH >= len(delta)
        if not enough or not self._drew_nothing():
            return None
        return cycling, last

    def _drew_nothing(self) -> bool:
        assert self._state is not None
        now = random_state(self.generator)
        return all(map(torch.equal, self._state, now)) and self._elsewhere == _state_elsewhere()


def rows_apart(model: nn.Module, x: Tensor) -> bool:
    """Whether the network says of some rows what it says of them among others, so that others may leave the batch.

    Batch statistics in eval mode, and noise from a generator of the network's own, are what it may depend on. The
    network is in the mode in which it is attacked. False where there are too few rows to tell.
    """
    some = len(x) // 2
    if some < 2:  # one row has no batch statistics
        return False
    with torch.no_grad():
        among, alone = model(x)[:some], model(x[:some])
    scale = among.abs().amax().clamp(min=1e-30)
    # Sums are made in another order in a batch of another size.
    return bool((among - alone).abs().amax() <= 256 * torch.finfo(among.dtype).eps * scale)


def _state_elsewhere() -> tuple[Any, ...]:
    """The states of Python's global generator and of NumPy's, from which some randomised networks draw."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # a new Generator is not what they draw from
    return random.getstate(), name, np.asarray(keys).tobytes(), *rest
