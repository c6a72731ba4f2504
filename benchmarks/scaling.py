"""How costs grow with sizes, an axis at a time: docs/results/scaling.md and a figure for each axis.

    python benchmarks/scaling.py [--only batch d] [--repeats 5] [--write docs/results]

Every point of an axis is timed in turn in one process, on one thread, and ratios are medians of the repeats' ratios.
Some minutes on two cores, and 3 GB of memory for the examples remembered. What is measured goes to
``scaling-AXIS.json``; the page has all axes that are there, so that ``--only`` measures one of them again.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import scaling_parts as parts
import scaling_steps as steps
import torch
from pages import at_least_one, show
from rich.console import Console
from rich.progress import Progress
from scaling_measure import Advance, Axis
from scaling_page import draw, section

from bilevel_at.commands import flags
from bilevel_at.errors import InputError


class Choice(NamedTuple):
    """What measures an axis, and at which points."""

    measure: Callable[[Sequence[int], int, Advance], Axis]
    points: tuple[int, ...]


AXES = {
    "batch": Choice(steps.batch, (8, 16, 32, 64, 128, 256)),
    "size": Choice(steps.size, (16, 24, 32, 48, 64, 96)),
    "width": Choice(steps.width, (8, 16, 32, 64, 128)),
    "classes": Choice(steps.classes, (1, 4, 9, 19, 49, 99)),
    "restarts": Choice(parts.restarts, (1, 2, 4, 8, 16)),
    "d": Choice(steps.dimension, (16, 32, 64, 128, 256, 512, 1024)),
    "rows": Choice(parts.rows, (4, 8, 16, 32, 64, 128, 256)),
    "remembered": Choice(parts.remembered, (1_000, 3_000, 10_000, 30_000, 60_000)),
    "workers": Choice(parts.workers, (0, 1, 2, 4)),
}


def provenance(name: str, repeats: int, points: int | None) -> str:
    """The command that measures this axis, the machine, the versions and the date."""
    fewer = "" if points is None else f" --points {points}"
    return (
        f"`python benchmarks/scaling.py --only {name} --repeats {repeats}{fewer} --write docs/results`; "
        f"{datetime.date.today()}, {platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} thread, "
        f"torch {torch.__version__}, Python {platform.python_version()}."
    )


def page(folder: Path) -> list[str]:
    """All axes that the folder has, in their order here."""
    lines = [
        "# How costs grow",
        "",
        "`python benchmarks/scaling.py --write docs/results`. Each axis is timed in one process on one thread, its "
        "points in turn in every repeat. Ratios are medians of the repeats' ratios: of two lines at one point (A / B), "
        "or of a line at a point and at the axis' first (× at). An exponent p means growth as the p-th power of the "
        "axis between the two points named.",
        "",
    ]
    for name in AXES:
        file = folder / f"scaling-{name}.json"
        if file.exists():
            record = json.loads(file.read_text())
            lines += section(Axis.from_dict(record["axis"]), record["provenance"])
    return lines[:-1]


def benchmark(
    only: tuple[str, ...] = tuple(AXES), repeats: int = 5, points: int | None = None, write: str | None = None
) -> None:
    """Measure how costs grow.

    Args:
        only: which of batch, size, width, classes, restarts, d, rows, remembered, workers.
        repeats: how often each point is timed.
        points: only so many points of each axis, the smallest ones.
        write: a folder for scaling.md, its figures and the measurements; if not given, tables are printed only.
    """
    at_least_one(repeats=repeats, points=points)
    unknown = [name for name in only if name not in AXES]
    if unknown:
        raise InputError(f"--only {unknown[0]} is not an axis; choose from {', '.join(AXES)}")
    torch.set_num_threads(1)
    console, folder = Console(), None if write is None else Path(write)
    # No thread refreshes the bar: it would count as processor time, and workers are forked.
    with Progress(console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(only) * (repeats + 1))

        def advance() -> None:
            progress.update(task, advance=1, refresh=True)

        for name in only:
            progress.update(task, description=name, refresh=True)
            torch.manual_seed(0)
            choice = AXES[name]
            axis = choice.measure(choice.points[:points], repeats, advance)
            advance()
            lines = section(axis, provenance(name, repeats, points))
            if folder is None:
                show(lines, None)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            record = {"provenance": lines[-2], "axis": axis.asdict()}
            (folder / f"scaling-{name}.json").write_text(json.dumps(record) + "\n")
            draw(axis, folder)
    if folder is not None:
        show(page(folder), str(folder / "scaling.md"))


def command(args: Sequence[str]) -> int:
    about = "How costs grow with sizes."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/scaling.py", about))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/scaling.py"))
