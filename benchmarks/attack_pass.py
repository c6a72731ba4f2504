"""Other ways to make an attack's passes, beside the one in use: docs/results/attack-pass.md.

    python benchmarks/attack_pass.py [--repeats 15] [--write docs/results/attack-pass.md]

A pass is the input gradient of the cross-entropy of a batch in eval mode. The record is the ratio of processor times,
in turn in one process; for the heap, of two processes (five pairs at most). Two minutes on one core.
"""

from __future__ import annotations

import copy
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from pages import at_least_one, show
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel_at.commands import flags
from bilevel_at.commands.heap import keep_freed_memory
from bilevel_at.models import build_model

SHAPES = {"small_cnn": ((1, 8, 8), 250), "small_resnet": ((3, 32, 32), 64)}
HEAP = "with the heap as glibc has it"


def gradient(model: nn.Module, x: Tensor, y: Tensor, half: bool = False) -> Tensor:
    delta = torch.zeros_like(x, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        loss = F.cross_entropy(model(x + delta), y, reduction="sum")
    return torch.autograd.grad(loss, delta)[0]


def ways(name: str) -> dict[str, Callable[[], object]]:
    """The pass in use and others, each on a batch of the same images."""
    shape, size = SHAPES[name]
    torch.manual_seed(0)
    model = build_model(name, shape, 10).eval()
    x, y = torch.rand(size, *shape), torch.randint(0, 10, (size,))
    frozen = copy.deepcopy(model).requires_grad_(False)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
    return {
        "in use": lambda: gradient(model, x, y),
        "parameters that require no gradient": lambda: gradient(frozen, x, y),
        "channels_last": lambda: gradient(last, x, y),
        "two batches of half the size": lambda: [gradient(model, *half) for half in halves],
        "bfloat16 autocast": lambda: gradient(model, x, y, half=True),
    }


def seconds(work: Callable[[], object], times: int = 4) -> float:
    start = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - start


def one_process(name: str, keep: bool, repeats: int) -> float:
    """The median time of the pass in use, in a process of its own."""
    program = f"import attack_pass as a; print(a.alone({name!r}, {keep}, {repeats}))"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def alone(name: str, keep: bool, repeats: int) -> float:
    if keep:
        keep_freed_memory()
    work = ways(name)["in use"]
    return statistics.median(seconds(work) for _ in range(repeats + 1))


def compare(name: str, repeats: int) -> dict[str, float]:
    """Way -> its time / that of the pass in use."""
    works = ways(name)
    times: dict[str, list[float]] = {way: [] for way in works}
    for repeat in range(repeats + 1):
        for way, work in works.items():
            spent = seconds(work)
            if repeat:  # the first warms up
                times[way].append(spent)
    ratios = {
        way: statistics.median(a / b for a, b in zip(each, times["in use"], strict=True)) for way, each in times.items()
    }
    pairs = [[one_process(name, keep, repeats) for keep in (False, True)] for _ in range(min(5, repeats))]
    return ratios | {HEAP: statistics.median(a / b for a, b in pairs)}


def benchmark(repeats: int = 15, write: str | None = None) -> None:
    """Time an attack's pass in other ways.

    Args:
        repeats: how often each is timed.
        write: a markdown file for the table.
    """
    at_least_one(repeats=repeats)
    torch.set_num_threads(1)
    columns = {name: compare(name, repeats) for name in SHAPES}
    lines = [
        "# An attack's pass in other ways",
        "",
        f"`python benchmarks/attack_pass.py --repeats {repeats}`; {datetime.date.today()}, {platform.machine()} CPU, 1 "
        f"thread, torch {torch.__version__}. The input gradient of a batch in eval mode, the median of processor time "
        "/ the way in use; the heap in pairs of processes.",
        "",
        f"| way | {' | '.join(f'{name}, {SHAPES[name][1]} images' for name in SHAPES)} |",
        "|---|" + "---|" * len(SHAPES),
        *(f"| {way} | {' | '.join(f'{c[way]:.2f}' for c in columns.values())} |" for way in columns["small_cnn"]),
    ]
    show(lines, write)


def command(args: Sequence[str]) -> int:
    about = "An attack's pass in other ways."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/attack_pass.py", about))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/attack_pass.py"))
