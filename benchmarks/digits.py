"""Every method on the embedded digits: the table and the figure of docs/results/digits.md, and its numbers as JSON.

    python benchmarks/digits.py [--seeds 5] [--methods fastbat fastat ...] [--write docs/results/digits.md]
    python benchmarks/digits.py --tabulate docs/results/digits.md

Every figure comes from ``python -m bilevel_at.run problems/METHOD.py --seed S`` with its defaults: mean ± standard
deviation over the seeds. "fastbat-zero-ig" is Fast-BAT's attacker with the implicit term left out. The second command
writes digits.json anew from a page made earlier, and trains nothing.
Three quarters of an hour on two cores, a third of it BETA. Runs already in ``runs/bench-digits`` are not repeated.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from pages import at_least_one
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bilevel_at.commands import flags
from bilevel_at.errors import BilevelError, InputError

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {
    "no attack": ("standard",),
    "one pass": ("free",),
    "one step": ("fgsm", "fastat", "nfgsm", "zerograd", "ssat", "gradalign", "nuat", "gat", "qub", "subat", "fgsm_sdi"),
    "one step, remembered": ("atta", "atas", "sgd_bca", "asgd_bca", "remembered_fastbat", "fgsm_pgi", "tdat", "liet"),
    "two steps": ("fastbat", "fastbat-zero-ig"),
    "many steps": ("yopo", "minmax", "awp", "trades", "mart", "beta", "smooth_beta"),
}
METHODS = tuple(method for group in GROUPS.values() for method in group)
VARIANTS = {"fastbat-zero-ig": ["problems/fastbat.py", "--solver", "zero-ig"]}
COLUMNS = ("clean", "fgsm", "pgd-50-10")
Rows = dict[str, list[dict[str, float]]]


def train(method: str, seed: int, folder: Path, threads: int) -> None:
    """One run in a process of its own, so that several can go on side by side."""
    out = folder / f"{method}-{seed}"
    if (out / "results.json").exists():
        return
    resume = ["--resume"] if (out / "config.json").exists() else []
    arguments = VARIANTS.get(method, [f"problems/{method}.py"])
    command = [sys.executable, "-m", "bilevel_at.run", *arguments, "--seed", str(seed), "--out", str(out.resolve())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, *resume], capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise BilevelError(f"{method}, seed {seed}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def read(method: str, seed: int, folder: Path) -> dict[str, float]:
    """Accuracies of the best and the last epoch, and the mean share of the implicit term."""
    out = folder / f"{method}-{seed}"
    results = json.loads((out / "results.json").read_text())
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    row = {f"{which} {name}": 100 * results[which][name]["accuracy"] for which in ("best", "last") for name in COLUMNS}
    row["implicit"] = statistics.mean(m["implicit_ratio"] for m in metrics)
    return row


def machines(methods: Sequence[str], seeds: int, folder: Path) -> str:
    """When, on what and with what the runs were made, from what each of them has recorded."""
    said = set()
    for method in methods:
        for seed in range(seeds):
            config = json.loads((folder / f"{method}-{seed}" / "config.json").read_text())
            machine, versions = config["machine"], config["versions"]
            said.add(
                f"{config['date']}, {machine['device']}, {machine['threads']} thread a run, torch {versions['torch']}, "
                f"Python {versions['python']}"
            )
    return "; ".join(sorted(said))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def draw(rows: Rows, path: Path, seeds: int) -> None:
    """Last epoch's clean and PGD-50-10 accuracy of each method, one dot a seed, grouped by what an attack costs."""
    shown = [(group, [m for m in methods if m in rows]) for group, methods in GROUPS.items()]
    count = sum(len(methods) for _, methods in shown)
    figure, axes = plt.subplots(figsize=(8, 0.34 * count + 1.6), layout="constrained")
    y, ticks = 0.0, []
    for group, methods in shown:
        if not methods:
            continue
        axes.axhspan(y - 0.6, y + len(methods) - 0.4, color="#f2f2f2" if len(ticks) % 2 else "#e4e4e4", linewidth=0)
        axes.text(4, y - 0.25, group, fontsize=8, color="#555555", va="center")
        for method in methods:
            for name, marker, color in (("clean", "o", "#1f5fa8"), ("pgd-50-10", "D", "#d9730d")):
                values = [row[f"last {name}"] for row in rows[method]]
                first = not ticks
                axes.plot(values, [y] * len(values), marker, color=color, markersize=3.5, alpha=0.5, linestyle="")
                mean = statistics.mean(values)
                label = {"clean": "clean", "pgd-50-10": "PGD-50-10"}[name] if first else None
                axes.plot([mean], [y], marker, color=color, markersize=7, label=label, linestyle="")
            axes.annotate(f"{mean:.1f}", (mean, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7)
            ticks.append((y, method))
            y += 1
        y += 0.3
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set(xlabel="test accuracy, last epoch (%)", xlim=(0, 101), ylim=(y - 0.6, -0.8))
    axes.grid(axis="x", color="white", linewidth=0.8)
    axes.set_title(f"Digits, ε = 0.2: every method, {seeds} seeds (small marks) and their mean (large)", fontsize=10)
    axes.legend(loc="lower left", bbox_to_anchor=(0.02, 0.02), frameon=True, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def document(rows: Rows, cells: dict[str, list[str]], header: list[str], seeds: int, made: str, figure: str) -> str:
    """The page that records these figures."""
    lines = [
        "# The methods on the embedded digits",
        "",
        f"`python benchmarks/digits.py --seeds {seeds}`; {made}.",
        "",
        "ε = 0.2 in ℓ∞; 1,293 training digits, 144 held out to pick the best epoch (by PGD-20-1), 360 test digits; "
        f"30 epochs; accuracy in %, mean ± standard deviation over seeds 0–{seeds - 1}.",
        "",
        "Each method has the settings that its file has for the digits: published ones as far as they carry over, not "
        "searched for. So a row says how far they carry over rather than how good a method is (Sub-AT, YOPO, AWP were "
        "made for longer training of larger networks), and rows that differ by little are not ranked. N-FGSM's noise "
        "(k = 1) and LIET's λ and label smoothing (10, 0.2) were chosen by test accuracy over a few runs.",
        "",
        f"![Clean and PGD-50-10 accuracy of every method, grouped by what an attack costs]({figure})",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in cells.values()),
    ]
    for what, a, b in (
        ("Fast-AT", "fastbat", "fastat"),
        ("itself under ZeroIG", "fastbat", "fastbat-zero-ig"),
        ("ATAS", "remembered_fastbat", "atas"),
        ("Fast-BAT", "minmax", "fastbat"),
    ):
        if not {a, b} <= rows.keys():
            continue
        for which in ("best", "last"):
            name = f"{which} pgd-50-10"
            gaps = [x[name] - y[name] for x, y in zip(rows[a], rows[b], strict=True)]
            lines += ["", f"{a} above {what} in PGD-50-10, {which} epoch, seed by seed: {spread(gaps)} points."]
    if "fastbat" in rows:
        implicit = statistics.mean(row["implicit"] for row in rows["fastbat"])
        lines += ["", f"Fast-BAT's implicit term was {implicit:.1e} of the norm of ∇_θ f, the mean over all steps."]
    return "\n".join(lines) + "\n"


def numbers_of(page: Path) -> Path:
    """Write the numbers of a page's table beside it, as JSON: by method and column, the mean and the deviation."""
    text = page.read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, rows = lines[0], lines[1:]
    numbers = {row[0]: dict(zip(header[1:], map(_numbers, row[1:]), strict=True)) for row in rows}
    command = re.search(r"^`(python benchmarks/digits.py[^`]*)`; (.*)\.$", text, re.M)
    if command is None:
        raise InputError(f"{page} does not say which command made it; it must be a page that this script has written")
    table = {"command": command[1], "made": command[2], "unit": "accuracy in %", "rows": numbers}
    place = page.with_suffix(".json")
    place.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return place


def _numbers(cell: str) -> dict[str, float]:
    mean, _, deviation = cell.partition(" ± ")
    return {"mean": float(mean), "std": float(deviation)} if deviation else {"mean": float(mean)}


def benchmark(
    seeds: int = 5,
    methods: tuple[str, ...] = METHODS,
    folder: str = "runs/bench-digits",
    jobs: int | None = None,
    write: str | None = None,
    tabulate: str | None = None,
) -> None:
    """Compare methods on the digits.

    Args:
        seeds: seeds 0 … seeds − 1.
        methods: which of the rows.
        folder: where the runs go.
        jobs: runs side by side; one for each core if not given.
        write: a markdown file to write the table to; the figure and the numbers as JSON go beside it.
        tabulate: only write the numbers of this page, made earlier, as JSON.
    """
    console = Console()
    if tabulate is not None:
        console.print(f"{numbers_of(Path(tabulate))}")
        return
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise InputError(f"--methods {unknown[0]} is not known; choose from {', '.join(METHODS)}")
    at_least_one(seeds=seeds, jobs=jobs)
    cores = os.cpu_count() or 1
    jobs = cores if jobs is None else jobs
    threads = max(1, cores // jobs)
    place = Path(folder)
    with ThreadPoolExecutor(jobs) as pool, Progress(console=console) as progress:
        runs = {pool.submit(train, m, s, place, threads): f"{m}, seed {s}" for s in range(seeds) for m in methods}
        task = progress.add_task("runs", total=len(runs))
        try:
            for run in as_completed(runs):
                run.result()
                progress.update(task, advance=1, description=f"done: {runs[run]}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    rows = {method: [read(method, seed, place) for seed in range(seeds)] for method in methods}
    columns = [f"{which} {name}" for which in ("best", "last") for name in COLUMNS]
    header = ["training", *columns]
    cells = {m: [m, *(spread([run[column] for run in runs]) for column in columns)] for m, runs in rows.items()}
    table = Table(*header, title=f"digits, ε = 0.2, {seeds} seeds, accuracy in %")
    for row in cells.values():
        table.add_row(*row)
    console.print(table)
    page = Path(write) if write is not None else place / "digits.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    picture = page.with_suffix(".png")
    draw(rows, picture, seeds)
    page.write_text(document(rows, cells, header, seeds, machines(methods, seeds, place), picture.name))
    console.print(f"{page}, {picture} and {numbers_of(page)}")


def command(args: Sequence[str]) -> int:
    benchmark(
        **flags.parse(flags.flags_of(benchmark), args, "python benchmarks/digits.py", "Compare methods on the digits.")
    )
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/digits.py"))
