"""The digits' main job in two checkouts: how much time it takes beside before, and whether it says the same.

    git worktree add ../before COMMIT
    python benchmarks/main_job.py --before ../before [--seeds 3] [--write docs/results/main-job.md]

``python -m bilevel_at.run problems/METHOD.py`` with its defaults, from start to exit, once in each checkout for each
seed, in turn. The record is the ratio of processor times, and whether every accuracy of ``results.json`` is equal.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pages import at_least_one, show
from rich.progress import Progress

from bilevel_at.commands import flags
from bilevel_at.errors import BilevelError, InputError

HERE = Path(__file__).resolve().parent.parent


def main_job(checkout: Path, method: str, seed: int, out: Path) -> tuple[float, dict[str, Any]]:
    """(processor seconds, accuracies by epoch and attack) of a run in a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "bilevel_at.run", f"problems/{method}.py", "--seed", str(seed), "--out", str(out)]
    with tempfile.TemporaryFile() as output:
        job = subprocess.Popen(command, cwd=checkout, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(job.pid, 0)
        if status:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().splitlines() or ["failed"]
            raise BilevelError(f"{checkout}, {method}, seed {seed}: {last[-1]}")
        job.returncode = 0  # wait4 has taken it
    results = json.loads((out / "results.json").read_text())
    accuracies = {which: {name: r["accuracy"] for name, r in rows.items()} for which, rows in results.items()}
    return usage.ru_utime + usage.ru_stime, accuracies


def commit_of(checkout: Path) -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True)
    return done.stdout.strip() or "?"


def benchmark(
    before: str, methods: tuple[str, ...] = ("fastbat", "fastat"), seeds: int = 3, write: str | None = None
) -> None:
    """Compare the main job with that of another checkout.

    Args:
        before: the other checkout.
        methods: problem files by name.
        seeds: seeds 0 … seeds − 1.
        write: a markdown file for the table.
    """
    at_least_one(seeds=seeds)
    other = Path(before).resolve()
    if not (other / "bilevel_at").is_dir():
        raise InputError(f"{before} is no checkout of this project; git worktree add ../before COMMIT makes one")
    rows = []
    with Progress() as progress, tempfile.TemporaryDirectory() as work:
        task = progress.add_task("runs", total=2 * seeds * len(methods))
        for method in methods:
            for seed in range(seeds):
                sides = []
                for side, checkout in enumerate((other, HERE)):
                    sides.append(main_job(checkout, method, seed, Path(work) / f"{method}-{seed}-{side}"))
                    progress.advance(task)
                (old, was), (new, now) = sides
                same = "equal" if was == now else f"{was} before, {now} now"
                rows.append(f"| {method} | {seed} | {new / old:.2f} | {same} |")
    lines = [
        "# The digits' main job beside an earlier one",
        "",
        f"`python benchmarks/main_job.py --before BEFORE --methods {' '.join(methods)} --seeds {seeds}` with "
        f"{commit_of(other)} as BEFORE and {commit_of(HERE)} here; {datetime.date.today()}, {platform.machine()} CPU, "
        f"1 thread, torch {torch.__version__}, Python {platform.python_version()}. Processor time of `python -m "
        "bilevel_at.run problems/METHOD.py` from start to exit.",
        "",
        "| method | seed | time / time before | accuracies of all attacks, best and last epoch |",
        "|---|---|---|---|",
        *rows,
    ]
    show(lines, write)


def command(args: Sequence[str]) -> int:
    about = "The digits' main job beside that of another checkout."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/main_job.py", about))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/main_job.py"))
