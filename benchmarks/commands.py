"""How long README's commands take: the table of docs/results/commands.md.

    python benchmarks/commands.py [--write docs/results/commands.md]

Runs the commands of README's first sections but for the installation and the tests, one after the other in an empty
folder, each in a process of its own. About two minutes on one core.
"""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pages import show

from bilevel_at.commands import flags
from bilevel_at.errors import BilevelError
from bilevel_at.runs.provenance import device_name, today, versions

ROOT = Path(__file__).resolve().parent.parent


def printed() -> list[str]:
    """The commands of README, in order, that call this library on the digits."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## In Python")[0]
    lines = [
        part.strip() for block in re.findall(r"```sh\n(.*?)```", readme, re.S) for part in re.split(r"\n|&&", block)
    ]
    return [line for line in lines if line.startswith("python -m bilevel_at.")]


def measured(command: str, folder: Path) -> tuple[float, float]:
    """(seconds, processor seconds) of a command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise BilevelError(f"{command}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def benchmark(write: str | None = None) -> None:
    """Time README's commands.

    Args:
        write: a markdown file to write the table to.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = [(command, *measured(command, Path(folder))) for command in printed()]
    made = versions("torch")
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    facts = f"{today()}, {device_name(torch.device('cpu'))}, {threads}, torch {made['torch']}, Python {made['python']}"
    lines = [
        "# How long README's commands take",
        "",
        f"`python benchmarks/commands.py`; {facts}. Processor time is that of all threads; seconds depend on what else "
        "the machine does.",
        "",
        "| command | seconds | processor seconds |",
        "|---|---|---|",
        *(f"| `{command}` | {wall:.0f} | {used:.0f} |" for command, wall, used in rows),
    ]
    show(lines, write)


def command(args: Sequence[str]) -> int:
    benchmark(
        **flags.parse(flags.flags_of(benchmark), args, "python benchmarks/commands.py", "Time README's commands.")
    )
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/commands.py"))
