"""Random draws made again: two passes that are to differ in their point alone must not differ in their noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Draws"]


class Draws:
    """What is about to be drawn at random, from ``generator`` and from torch's global one (dropout).

    Args:
        generator: the generator that the passes draw from; None for the global one.
        device: where the network is.
    """

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self._source = None if generator is None else generator.device
        self._state = None if generator is None else generator.get_state()
        self._cpu = torch.get_rng_state()
        self._cuda = [device] if device.type == "cuda" else []
        self._cuda_states = [torch.cuda.get_rng_state(d) for d in self._cuda]

    @contextmanager
    def again(self) -> Iterator[torch.Generator | None]:
        """A generator that gives the same draws; the caller's, and the global one, end as they were."""
        with torch.random.fork_rng(devices=self._cuda):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._cuda, self._cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            if self._source is None or self._state is None:
                yield None
            else:
                generator = torch.Generator(self._source)
                generator.set_state(self._state)
                yield generator
