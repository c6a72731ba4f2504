"""Where an epoch stands between two updates: what a checkpoint inside an epoch holds beside the players' own state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import shares
from ..draws import generator_on, random_state

__all__ = ["Position", "own_randomness"]

PLAIN = ("epoch", "updates", "skipped", "left_out", "measured")


@dataclass
class Position:
    """Where an epoch stands between two updates.

    Args:
        epoch: its number, from 0.
        generator: what the attack draws from.
        means: sums over examples of (loss, share of the implicit term, its cosine).
        looks: sums of (correct on x + δ*, ‖δ*‖_∞, rows).
        updates: done or left out; the replays of a batch are an update each.
        skipped: updates left out, because a number was not finite.
        left_out: examples that ``means`` has not got for that reason.
        measured: what the epoch's training has measured, once it is over.
        seconds: of the epoch, in commands before this one.
        randomness: the state of torch's global generators, to go on from; None in an epoch that begins here.
    """

    epoch: int
    generator: torch.Generator
    means: Tensor
    looks: Tensor
    updates: int = 0
    skipped: int = 0
    left_out: int = 0
    measured: dict[str, Any] | None = None
    seconds: float = 0.0
    randomness: list[Tensor] | None = None
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def start(cls, epoch: int, seed: int, device: torch.device) -> Position:
        """The beginning of an epoch, whose draws depend on ``(seed, epoch)`` alone."""
        means, looks = (torch.zeros(3, dtype=torch.float64, device=device) for _ in range(2))
        return cls(epoch, generator_on(device, 2_000_003 * seed + epoch), means, looks)

    @property
    def under_way(self) -> bool:
        return self.updates > 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; inside the epoch, torch's global generators are as the next update finds them."""
        return {
            **{name: getattr(self, name) for name in PLAIN},
            "means": shares.summed(self.means.clone()),
            "looks": shares.summed(self.looks.clone()),
            "seconds": self.seconds + time.perf_counter() - self.began,
            "device": self.means.device.type,
            "random": random_state(self.generator),
            "others": shares.gathered(random_state(self.generator))[1:],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], seed: int, device: torch.device) -> Position:
        """Restore what :meth:`state_dict` returned.

        Generators of another type of device have other states: there, the draws begin as those of the epoch did. So do
        those of torch's global generators on other processes than the first where there were not as many.
        """
        position = cls.start(state["epoch"], seed, device)
        for name in (*PLAIN, "seconds"):
            setattr(position, name, state[name])
        if shares.rank() == 0:  # sums over processes
            position.means.copy_(state["means"])
            position.looks.copy_(state["looks"])
        if state["device"] == device.type:
            by_rank = [state["random"], *state.get("others", [])]
            position.generator.set_state(state["random"][0].cpu())  # they may be loaded to a GPU
            if shares.rank() == 0 or len(by_rank) == shares.count():
                position.randomness = [part.cpu() for part in by_rank[shares.rank()][1:]]
        return position


@contextmanager
def own_randomness(position: Position, seed: int) -> Iterator[None]:
    """Torch's global generators, of the CPU and of the position's GPU, are the epoch's; then the caller's again."""
    device = position.means.device
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        if position.randomness is not None:
            torch.set_rng_state(position.randomness[0])
            if on_gpu:
                torch.cuda.set_rng_state(position.randomness[1], device)
        yield
