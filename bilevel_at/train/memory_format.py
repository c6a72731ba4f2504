"""The memory format of a network's weights, by measurement."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Literal

import torch
from torch import nn

from ..batch import Batch
from ..draws import generator_on
from ..modes import autocast
from ..problem import BilevelProblem
from ..solver import Solver

__all__ = ["FORMATS", "MemoryFormat", "seconds_by_memory_format"]

MemoryFormat = Literal["contiguous", "channels_last"]

FORMATS: dict[MemoryFormat, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}

WARM_UP, REPEATS = 2, 5  # hypergradients in each format, in turn


def seconds_by_memory_format(
    problem: BilevelProblem, solver: Solver, model: nn.Module, batch: Batch, precision: str = "float32"
) -> dict[MemoryFormat, float]:
    """Seconds of a hypergradient with the network in each memory format: the median of a few, taken in turn.

    The device is the batch's. Everything happens on copies and torch's global generators are put back: the network with
    its buffers, what the problem and the solver remember, and random states are as they were. Copies of a compiled
    solver are not compiled; inductor chooses the layout of convolutions for itself.

    Args:
        problem, solver, model: as for ``solver.hypergradient``; the network is measured in train mode.
        batch: examples of the size that a step has.
        precision: "float32", or "bfloat16" for autocast.

    Returns:
        Seconds by format; empty where the network has no weight that the two formats order differently.
    """
    device = batch.x.device
    dimensions = {p.ndim for p in model.parameters()}
    if 4 not in dimensions or 5 in dimensions:  # torch has no channels_last of five dimensions
        return {}
    seconds: dict[MemoryFormat, list[float]] = {name: [] for name in FORMATS}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        players = {
            name: (*copy.deepcopy((problem, solver)), copy.deepcopy(model).train().to(memory_format=layout))
            for name, layout in FORMATS.items()
        }
        for number in range(WARM_UP + REPEATS):
            for name, (own_problem, own_solver, network) in players.items():
                start = _clock(device)
                with autocast(precision, device):
                    own_solver.hypergradient(own_problem, network, batch, generator=generator_on(device, number))
                seconds[name].append(_clock(device) - start)
    return {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}


def _clock(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
