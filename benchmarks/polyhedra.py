"""Projection onto polyhedra in batches beside the one-by-one NNLS: times, their ratio, and how far the points differ.

    python benchmarks/polyhedra.py [--device cuda] [--write docs/results/polyhedra.md]

Normal draws are projected by ``Polyhedron.project`` and by the reference, in turn in one run; each row has
the least time of its repeats. A minute on one core.
"""

from __future__ import annotations

import datetime
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from pages import at_least_one, show
from torch import Tensor

import bilevel_at as ba
from bilevel_at import nearest_points
from bilevel_at.commands import flags
from bilevel_at.commands.device import resolve_device
from bilevel_at.errors import InputError
from bilevel_at.nnls import nearest_one_by_one
from bilevel_at.runs.provenance import device_name


class Size(NamedTuple):
    """Samples, values of each, rows, whether there is an input range besides, and the scale of what is projected."""

    samples: int
    values: int
    rows: int
    bounds: bool
    scale: float


SIZES = (
    Size(128, 64, 20, False, 1.0),
    Size(128, 64, 20, True, 0.3),
    Size(128, 64, 20, True, 1.0),
    Size(128, 64, 20, True, 3.0),
    Size(512, 64, 20, True, 1.0),
    Size(32, 256, 20, False, 1.0),
    Size(32, 256, 20, True, 1.0),
    Size(256, 12, 6, True, 1.0),
    Size(64, 64, 60, False, 1.0),
    Size(64, 64, 60, True, 1.0),
    Size(64, 64, 128, True, 1.0),
)


class Compared(NamedTuple):
    """Seconds of both, the largest distance of their points, and how many samples the batched method left to NNLS."""

    single: float
    batched: float
    distance: float
    left: int


def least_time(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """(the result, its seconds): of the processor where that computes, which other jobs disturb least."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    out = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return out, clock() - start


def compare(size: Size, repeats: int, device: torch.device) -> Compared:
    """Project the same draws both ways, ``repeats`` times in turn after one that warms up."""
    g = torch.Generator().manual_seed(0)
    B = torch.randn(size.rows, size.values, generator=g, dtype=torch.float64)
    b = (0.05 + 0.3 * torch.rand(size.rows, generator=g, dtype=B.dtype)) * B.norm(dim=1)
    polyhedron = ba.Polyhedron(B, b, (0, 1) if size.bounds else None)
    delta = (size.scale * torch.randn(size.samples, size.values, generator=g, dtype=B.dtype)).to(device)
    x = torch.rand(size.samples, size.values, generator=g, dtype=B.dtype).to(device)
    ways: dict[str, Callable[[], Tensor]] = {
        "single": lambda: nearest_one_by_one(delta, *polyhedron.rows(x)),
        "batched": lambda: polyhedron.project(delta, x),
    }
    with mock.patch.object(nearest_points, "one_by_one", wraps=nearest_points.one_by_one) as reference:
        ways["batched"]()
    left = sum(len(call.args[0].u) for call in reference.call_args_list)
    points, seconds = dict[str, Tensor](), {way: float("inf") for way in ways}
    for repeat in range(repeats + 1):
        for way, run in ways.items():
            points[way], elapsed = least_time(run, device)
            if repeat:
                seconds[way] = min(seconds[way], elapsed)
    distance = (points["single"] - points["batched"]).norm(dim=1).max().item()
    return Compared(seconds["single"], seconds["batched"], distance, left)


def benchmark(repeats: int = 7, device: str = "auto", sizes: tuple[int, ...] = (), write: str | None = None) -> None:
    """Compare the two ways of projecting.

    Args:
        repeats: pairs that are timed.
        device: cpu, cuda, or auto.
        sizes: which rows of the table to make, by their number from 1; all by default.
        write: a markdown file to write the table to.
    """
    at_least_one(repeats=repeats)
    place = resolve_device(device)
    for i in sizes:
        if not 1 <= i <= len(SIZES):
            raise InputError(f"--sizes {i} is not a row of the table; it must be from 1 to {len(SIZES)}")
    chosen = [SIZES[i - 1] for i in sizes] or SIZES
    lines = [
        "# Projection onto polyhedra: in batches beside one by one",
        "",
        f"`python benchmarks/polyhedra.py --repeats {repeats} --device {device}`; {datetime.date.today()}, "
        f"{device_name(place)}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}. Milliseconds of {'processor' if place.type == 'cpu' else 'wall'} time, float64, "
        "the least of interleaved repeats.",
        "",
        "| samples | values | rows | input range | scale of δ | one by one, ms | in batches, ms | ratio | "
        "left to one by one | largest distance of the points |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in chosen:
        at = compare(size, repeats, place)
        lines.append(
            f"| {size.samples} | {size.values} | {size.rows} | {'[0, 1]' if size.bounds else 'none'} | "
            f"{size.scale:g} | {1e3 * at.single:.1f} | {1e3 * at.batched:.1f} | {at.single / at.batched:.1f} | "
            f"{at.left} | {at.distance:.0e} |"
        )
    show([*lines, "", "On a CPU, where there are more rows than values, `project` itself goes one by one."], write)


def command(args: Sequence[str]) -> int:
    benchmark(
        **flags.parse(flags.flags_of(benchmark), args, "python benchmarks/polyhedra.py", "Projection onto polyhedra.")
    )
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/polyhedra.py"))
