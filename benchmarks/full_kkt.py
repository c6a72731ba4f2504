"""FullKKT's conjugate gradients beside its dense form: the ratio of their times, and how far their adjoints differ.

    python benchmarks/full_kkt.py [--write docs/results/full-kkt.md]

The adjoint of the Hessian-aware Fast-BAT problem alone, on a softplus network, in float32: both forms in turn in one
run, the median of paired ratios. A minute on two cores.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from pages import at_least_one, show
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.commands import flags
from bilevel_at.solvers import FullKKT

SIZES = (12, 27, 48, 75, 108, 192)


def network(d: int) -> nn.Module:
    """Two hidden layers of 64 softplus units."""
    layers = [nn.Linear(d, 64), nn.Softplus(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def compare(d: int, examples: int, repeats: int) -> tuple[float, float]:
    """(median of dense time / conjugate gradients' time, largest relative difference of the adjoints)."""
    torch.manual_seed(0)
    model = network(d)
    batch = ba.Batch(torch.rand(examples, d), torch.arange(examples) % 10)
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.3, None), "zero", "taylor", 0.5)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    solution = lower.solve(model, batch, differentiable=True)
    v = torch.randn(batch.x.shape)
    solvers = {method: FullKKT(method, curvature="attack", damping=3.0) for method in ("dense", "cg")}
    ratios, adjoints = [], dict[str, Tensor]()
    for repeat in range(repeats + 1):
        seconds = {}
        for method, solver in solvers.items():
            start = time.perf_counter()
            adjoints[method] = solver.adjoint(problem, model, solution, v)
            seconds[method] = time.perf_counter() - start
        if repeat:  # the first warms up
            ratios.append(seconds["dense"] / seconds["cg"])
    gap = (adjoints["dense"] - adjoints["cg"]).flatten(1).norm(dim=1) / adjoints["dense"].flatten(1).norm(dim=1)
    return statistics.median(ratios), gap.max().item()


def benchmark(examples: int = 64, repeats: int = 9, write: str | None = None) -> None:
    """Compare the two forms of FullKKT.

    Args:
        examples: in the batch.
        repeats: pairs that are timed.
        write: a markdown file to write the table to.
    """
    at_least_one(examples=examples, repeats=repeats)
    rows = [(d, *compare(d, examples, repeats)) for d in SIZES]
    lines = [
        "# FullKKT: conjugate gradients beside the dense form",
        "",
        f"`python benchmarks/full_kkt.py --examples {examples} --repeats {repeats}`; {datetime.date.today()}, "
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}. The adjoint alone, float32, d values an input.",
        "",
        "| d | dense time / conjugate gradients' time, median of pairs | largest relative difference of w |",
        "|---|---|---|",
        *(f"| {d} | {ratio:.1f} | {gap:.0e} |" for d, ratio, gap in rows),
    ]
    show(lines, write)


def command(args: Sequence[str]) -> int:
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/full_kkt.py", "FullKKT's two forms."))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/full_kkt.py"))
