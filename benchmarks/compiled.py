"""Compiled steps beside uncompiled ones: the ratio of their times, how far they differ, and what compiling takes.

    python benchmarks/compiled.py [--device cuda] [--write docs/results/compiled.md]

The hypergradient alone, of the same network on the same batches, both forms in turn in one run; the median of paired
ratios. A few minutes on two cores, most of it compiling.
"""

from __future__ import annotations

import datetime
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from pages import at_least_one, show
from torch._inductor import config as inductor

import bilevel_at as ba
from bilevel_at.commands import flags
from bilevel_at.commands.device import resolve_device
from bilevel_at.models import build_model
from bilevel_at.runs.problem_file import ProblemFile
from bilevel_at.runs.provenance import device_name
from bilevel_at.solvers import ZeroIG

SHAPES = {"small_cnn": (1, 8, 8)}  # else CIFAR's


def clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, which others may share, and of the wall once a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def compare(
    model_name: str, method: str, batch_size: int, repeats: int, device: torch.device
) -> tuple[float, float, float]:
    """(uncompiled time / compiled time, largest relative difference of dF/dθ, seconds until the first step is done)."""
    shape = SHAPES.get(model_name, (3, 32, 32))
    file = ProblemFile(method)
    problem = file.problem(**file.recipe("digits" if model_name == "small_cnn" else "cifar10").problem)
    plain, compiled = (ZeroIG() if file.solver is None else file.solver() for _ in range(2))
    compiled.compile()
    torch.manual_seed(0)
    model = build_model(model_name, shape, 10).to(device).train()
    g = torch.Generator().manual_seed(0)
    batch = ba.Batch(torch.rand(batch_size, *shape, generator=g), torch.arange(batch_size) % 10).to(device)
    generator, ratios, gaps, first = torch.Generator(device), [], [], 0.0
    for repeat in range(repeats + 2):
        seconds, gradients = [], []
        for solver in (plain, compiled):
            generator.manual_seed(repeat)
            start, wall = clock(device), time.perf_counter()
            step = solver.hypergradient(problem, model, batch, generator=generator)
            seconds.append(clock(device) - start)
            first = first or (time.perf_counter() - wall if solver is compiled else 0.0)
            gradients.append(torch.cat([g.flatten() for g in step.grads.values() if g is not None]))
        if repeat > 1:  # the first compiles, the second warms up
            ratios.append(seconds[0] / seconds[1])
            gaps.append(((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item())
    return statistics.median(ratios), max(gaps), first


def benchmark(
    models: tuple[str, ...] = ("small_cnn", "small_resnet"),
    methods: tuple[str, ...] = ("fastat", "fastbat"),
    batch_size: int = 128,
    repeats: int = 15,
    device: str = "auto",
    write: str | None = None,
) -> None:
    """Compare compiled and uncompiled hypergradients.

    Args:
        models: networks by name.
        methods: problem files by name.
        batch_size: examples in the batch.
        repeats: pairs that are timed.
        device: cpu, cuda, or auto for a GPU where there is one.
        write: a markdown file to write the table to.
    """
    at_least_one(batch_size=batch_size, repeats=repeats)
    where = resolve_device(device)
    cases = [(model, method) for model in models for method in methods]
    with inductor.patch(force_disable_caches=True):
        rows = [(*case, *compare(*case, batch_size, repeats, where)) for case in cases]
    lines = [
        "# Compiled steps beside uncompiled ones",
        "",
        f"`python benchmarks/compiled.py --models {' '.join(models)} --methods {' '.join(methods)} --batch-size "
        f"{batch_size} --repeats {repeats}`; {datetime.date.today()}, {device_name(where)}, "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}. Float32; the hypergradient alone. "
        "A pixel whose gradient is nearly 0 turns with its rounding, and a unit at its kink with it; in float64 both "
        "forms agree to 1e-12 (`tests/solvers/test_compile.py`). First steps without torch's cache of earlier ones.",
        "",
        "| network, method | uncompiled time / compiled time | largest relative difference of dF/dθ | first step, s |",
        "|---|---|---|---|",
        *(
            f"| {model}, {method} | {ratio:.2f} | {gap:.0e} | {first:.0f} |"
            for model, method, ratio, gap, first in rows
        ),
    ]
    show(lines, write)


def command(args: Sequence[str]) -> int:
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/compiled.py", "Compiled steps."))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/compiled.py"))
