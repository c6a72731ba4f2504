"""Random draws made again: two passes that are to differ in their point alone must not differ in their noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import shares

__all__ = ["Draws", "difference", "generator_on", "host_uniform", "is_global", "rand", "randn", "random_state"]


def rand(shape: Sequence[int], generator: torch.Generator | None = None, **of: Any) -> Tensor:
    """``torch.rand`` for rows of a batch: of several processes, each has the rows that one process would draw.

    All draw for the whole batch, from generators in the same state, and each takes its own.

    Args:
        shape: ``[B · k, ...]``, k rows for each example.
        generator: as for ``torch.rand``.
        of: ``dtype`` and ``device``.

    Raises:
        InputError: among several processes, where the rows are not of examples.
    """
    return _rows(torch.rand, shape, generator, of)


def randn(shape: Sequence[int], generator: torch.Generator | None = None, **of: Any) -> Tensor:
    """``torch.randn`` for rows of a batch, as :func:`rand`."""
    return _rows(torch.randn, shape, generator, of)


def _rows(draw: Callable[..., Tensor], shape: Sequence[int], generator: Any, of: dict[str, Any]) -> Tensor:
    share = shares.current()
    if share is None:
        return draw(shape, generator=generator, **of)
    whole = share.whole * share.times(shape[0])
    return share.of(draw((whole, *shape[1:]), generator=generator, **of))


def generator_on(device: torch.device, seed: int) -> torch.Generator:
    """A generator for tensors on ``device``, seeded; on the meta device one of the CPU, from which nothing is drawn."""
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)


def host_uniform(generator: torch.Generator | None) -> float:
    """A number uniform in [0, 1) for the host to branch on, drawn from ``generator`` (None: torch's global one).

    From a generator of another device it is a hash of its state, which then moves on by one draw: a look at the draw
    itself would wait for the device.
    """
    if generator is None or generator.device.type == "cpu":
        return torch.rand((), generator=generator).item()
    digest = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()
    torch.rand((), generator=generator, device=generator.device)
    return int.from_bytes(digest[:4], "little") / 2**32


class Draws:
    """What is about to be drawn at random, from ``generator`` and from torch's global one (dropout).

    Args:
        generator: the generator that the passes draw from; None, or a default generator of torch's, for the global one.
        device: where the network is.
    """

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self._generator = generator
        # A copy of a default generator would be a second stream, where the passes had one.
        self._state = None if generator is None or is_global(generator, device) else generator.get_state()
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
            if self._generator is None or self._state is None:
                yield self._generator
            else:
                generator = torch.Generator(self._generator.device)
                generator.set_state(self._state)
                yield generator


def random_state(generator: torch.Generator) -> list[Tensor]:
    """The states of ``generator`` and of torch's own for its device: equal before and after what draws nothing."""
    states = [generator.get_state(), torch.get_rng_state()]
    if generator.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(generator.device))
    return states


def difference(loss: Callable[[Tensor], Tensor], before: Tensor, after: Tensor) -> Tensor:
    """Σ loss(after) − Σ loss(before), where both passes make the same draws: dropout drops the same units."""
    draws = Draws(None, after.device)
    low = loss(before)
    with draws.again():
        high = loss(after)
    return high.sum() - low.sum()


def is_global(generator: torch.Generator, device: torch.device) -> bool:
    """Whether this is torch's own generator, of the CPU or of ``device``."""
    of_device = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else None
    return generator is torch.default_generator or generator is of_device
