"""``--memory-format``: given, recorded by an earlier start of the run, or measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..batch import Batch
from ..runs.directory import RunDir
from ..runs.provenance import device_name
from ..train.memory_format import FORMATS, MemoryFormat, seconds_by_memory_format
from .plan import Plan
from .prepare import Prepared
from .start import resumes

__all__ = ["Layout", "memory_format_of"]

MEASURED_ON = ("cuda",)  # types of devices


@dataclass(frozen=True)
class Layout:
    """The memory format of a run's network.

    name: the format.
    seconds: of a hypergradient by format, where it was measured.
    """

    name: MemoryFormat
    seconds: Mapping[MemoryFormat, float] = field(default_factory=dict)

    def asdict(self) -> dict[str, Any]:
        """As ``config.json`` has it."""
        return asdict(self)


def memory_format_of(plan: Plan, prepared: Prepared, run: RunDir) -> Layout:
    """The memory format that this command trains with.

    ``auto`` is what a resumed run was trained with on such a device. Otherwise it is the faster one on a GPU, and
    contiguous on a CPU: there a choice by time would make a seed's bits a matter of chance. What channels_last gains in
    first-order passes on a CPU it loses in the double backward (``benchmarks/epoch.py --device cpu`` times both).
    """
    asked, device = plan.options.memory_format, prepared.test.device
    if asked != "auto":
        return Layout(asked)
    recorded = _recorded(run, device) if resumes(plan.options, run) else None
    if recorded is not None:
        return recorded
    return _measured(plan, prepared) if device.type in MEASURED_ON else Layout("contiguous")


def _recorded(run: RunDir, device: torch.device) -> Layout | None:
    """The choice in the run's ``config.json``, if it was made on such a device."""
    config = run.config()
    try:
        name, seconds = config["memory_format"]["name"], config["memory_format"]["seconds"]
        same = config["machine"]["device"] == device_name(device) and name in FORMATS
    except (KeyError, TypeError):  # of an older version, or no run's, which resuming it says
        return None
    return Layout(name, seconds) if same else None


def _measured(plan: Plan, prepared: Prepared) -> Layout:
    """The faster format for this run's step, on its own network and training images."""
    few = prepared.train[slice(0, plan.options.batch_size)]
    index = torch.arange(len(few), device=few.device)
    batch = Batch(few.pixels(), few.y, index, examples=len(prepared.train))
    with plan.file.blame("a step cannot be made: "):
        seconds = seconds_by_memory_format(plan.problem, plan.solver, prepared.model, batch, plan.options.precision)
    return Layout(min(FORMATS, key=lambda name: seconds.get(name, 0.0)), seconds)
