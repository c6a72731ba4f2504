"""The methods side by side on the embedded digits, and the table of docs/results/digits.md.

    python benchmarks/digits.py [--seeds 5] [--methods fastbat fastat ...] [--write docs/results/digits.md]

Every figure comes from ``python -m bilevel_at.run problems/METHOD.py --seed S`` with its defaults: mean ± standard
deviation over the seeds. "fastbat-zero-ig" is Fast-BAT's attacker with the implicit term left out.
About a quarter of an hour on two cores, most of it BETA. Runs already in ``runs/bench-digits`` are not repeated.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bilevel_at import flags
from bilevel_at import run as main_job
from bilevel_at.errors import InputError

METHODS = {
    "standard": ["problems/standard.py"],
    "fastat": ["problems/fastat.py"],
    "atas": ["problems/atas.py"],
    "fastbat": ["problems/fastbat.py"],
    "fastbat-zero-ig": ["problems/fastbat.py", "--solver", "zero-ig"],
    "minmax": ["problems/minmax.py"],
    "beta": ["problems/beta.py"],
}
COLUMNS = ("clean", "fgsm", "pgd-50-10")


def one(method: str, seed: int, folder: Path) -> dict[str, float]:
    """Accuracies of the best and the last epoch, and the mean share of the implicit term."""
    out = folder / f"{method}-{seed}"
    if not (out / "results.json").exists():
        resume = ["--resume"] if (out / "config.json").exists() else []
        main_job.run([*METHODS[method], "--seed", str(seed), "--out", str(out), *resume])
    results = json.loads((out / "results.json").read_text())
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    row = {f"{which} {name}": 100 * results[which][name]["accuracy"] for which in ("best", "last") for name in COLUMNS}
    row["implicit"] = statistics.mean(m["implicit_ratio"] for m in metrics)
    return row


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def document(
    rows: dict[str, list[dict[str, float]]], cells: dict[str, list[str]], header: list[str], seeds: int
) -> str:
    """The page that records these figures."""
    machine = (
        f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    about = f"30 epochs; accuracy in %, mean ± standard deviation over seeds 0–{seeds - 1}."
    lines = [
        "# The methods on the embedded digits",
        "",
        f"`python benchmarks/digits.py --seeds {seeds}`, {datetime.date.today().isoformat()}, {machine}.",
        "",
        f"ε = 0.2 in ℓ∞; 1,293 training digits, 144 held out to pick the best epoch (by PGD-20-1), 360 test digits;"
        f" {about}",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in cells.values()),
    ]
    for what, a, b in (("Fast-AT", "fastbat", "fastat"), ("itself under ZeroIG", "fastbat", "fastbat-zero-ig")):
        if not {a, b} <= rows.keys():
            continue
        for which in ("best", "last"):
            name = f"{which} pgd-50-10"
            gaps = [x[name] - y[name] for x, y in zip(rows[a], rows[b], strict=True)]
            lines += ["", f"Fast-BAT above {what} in PGD-50-10, {which} epoch, seed by seed: {spread(gaps)} points."]
    if "fastbat" in rows:
        implicit = statistics.mean(row["implicit"] for row in rows["fastbat"])
        lines += ["", f"Fast-BAT's implicit term was {implicit:.1e} of the norm of ∇_θ f, the mean over all steps."]
    return "\n".join(lines) + "\n"


def benchmark(
    seeds: int = 5,
    methods: tuple[str, ...] = tuple(METHODS),
    folder: str = "runs/bench-digits",
    write: str | None = None,
) -> None:
    """Compare methods on the digits.

    Args:
        seeds: seeds 0 … seeds − 1.
        methods: which of the rows.
        folder: where the runs go.
        write: a markdown file to write the table to.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise InputError(f"--methods {unknown[0]} is not known; choose from {', '.join(METHODS)}")
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}; it must be at least 1")
    rows = {method: [one(method, seed, Path(folder)) for seed in range(seeds)] for method in methods}
    header = ["training", *(f"{which} {name}" for which in ("best", "last") for name in COLUMNS)]
    cells = {
        method: [
            method,
            *(spread([r[f"{which} {name}"] for r in runs]) for which in ("best", "last") for name in COLUMNS),
        ]
        for method, runs in rows.items()
    }
    table = Table(*header, title=f"digits, ε = 0.2, {seeds} seeds, accuracy in %")
    for row in cells.values():
        table.add_row(*row)
    Console().print(table)
    if write is not None:
        Path(write).parent.mkdir(parents=True, exist_ok=True)
        Path(write).write_text(document(rows, cells, header, seeds))


def command(args: Sequence[str]) -> int:
    benchmark(
        **flags.parse(flags.flags_of(benchmark), args, "python benchmarks/digits.py", "Compare methods on the digits.")
    )
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/digits.py"))
