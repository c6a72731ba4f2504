"""Catastrophic overfitting on CIFAR-10, on a CPU: the figure and the page docs/results/overfitting.md.

    python benchmarks/overfitting.py --data-dir D [--seeds 3] [--write docs/results/overfitting.md]

A narrow residual network on 10,000 images at ε = 24/255 (one of the radii of GradAlign's appendix D.4). FGSM from z = 0
teaches it to recognise the attack: accuracy on attacked training images rises while held-out PGD accuracy collapses.
The other methods train the same network on the same images for as many epochs. About twenty minutes on two cores.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import Progress

from bilevel_at.commands import flags
from bilevel_at.data import load_data
from bilevel_at.errors import InputError
from bilevel_at.evaluate import attack_from_name
from bilevel_at.models.residual import small_resnet
from bilevel_at.runs.problem_file import ProblemFile
from bilevel_at.train import Recipe, Trainer, catastrophic_overfitting

STYLES = {
    "fgsm": ("FGSM, zero start", "#d9730d", "-", "o"),
    "fastat": ("Fast-AT, uniform start", "#a05195", "--", "v"),
    "gradalign": ("GradAlign", "#1f5fa8", "-", "s"),
    "atas": ("ATAS", "#2f4b7c", ":", "D"),
    "fastbat": ("Fast-BAT", "#111111", "-.", "^"),
}


def train(method: str, seed: int, epsilon: float, data_dir: str, examples: int, epochs: int) -> list[dict[str, Any]]:
    """The lines that a run's metrics.jsonl would have."""
    torch.set_num_threads(1)
    data, _ = load_data("cifar10", data_dir, download=False)
    images, held_out = data.sample(examples).split(0.1)
    recipe = Recipe(epochs=epochs, batch_size=64, lr=0.1)
    file = ProblemFile(method)
    assert file.solver is not None
    solver = file.solver(epsilon=epsilon) if method == "fastbat" else file.solver()
    torch.manual_seed(seed)
    model = small_resnet((3, 32, 32), 10, width=16)  # 77,000 parameters, on [0, 1] inputs
    attack = attack_from_name("pgd-10-1", epsilon)
    trainer = Trainer(file.problem(epsilon=epsilon), solver, model, images, held_out, recipe, attack, seed)
    return [epoch.asdict() for epoch in trainer.epochs()]


def draw(runs: dict[str, list[list[dict[str, Any]]]], path: Path, epsilon: float) -> None:
    """Held-out PGD accuracy and accuracy on the attacked training images, by epoch; a cross where a run collapsed."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.9), layout="constrained", sharex=True)
    for axes, key, title in (
        (panels[0], "robust", "held-out images, PGD-10"),
        (panels[1], "train", "training images, as the method attacks them"),
    ):
        for method, seeds in runs.items():
            label, color, dash, marker = STYLES[method]
            epochs = [line["epoch"] for line in seeds[0]]
            for lines in seeds:
                axes.plot(epochs, [100 * line[key] for line in lines], color=color, linewidth=0.6, alpha=0.4)
                collapse = catastrophic_overfitting(lines)
                if collapse is not None:
                    after = collapse.after
                    axes.plot(after["epoch"], 100 * after[key], "x", color=color, markersize=9, markeredgewidth=2)
            means = [100 * statistics.mean(line[key] for line in lines) for lines in zip(*seeds, strict=True)]
            axes.plot(epochs, means, dash, color=color, marker=marker, markersize=4, linewidth=1.6, label=label)
        axes.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, None))
        axes.set_title(title, fontsize=10)
    panels[1].legend(fontsize=8, frameon=False, loc="upper left")
    number = len(next(iter(runs.values())))
    figure.suptitle(
        f"CIFAR-10, ε = {255 * epsilon:.0f}/255, {number} seeds (thin) and their mean; ✗ catastrophic overfitting",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def document(
    runs: dict[str, list[list[dict[str, Any]]]], epsilon: float, examples: int, command: str, figure: str
) -> str:
    """The page: what was done, on what, and what was seen."""
    seeds, epochs = len(next(iter(runs.values()))), len(next(iter(runs.values()))[0])
    lines = [
        "# Catastrophic overfitting on CIFAR-10",
        "",
        f"`{command}`, {datetime.date.today().isoformat()}, {platform.machine()} CPU, {os.cpu_count()} cores, "
        f"1 thread a run, torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        f"{examples:,} training images, a tenth of them held out; a pre-activation residual network of three blocks "
        f"(width 16); ε = {255 * epsilon:.0f}/255 in ℓ∞; {epochs} epochs of batch 64, SGD 0.9 with the rate going "
        "0 → 0.1 → 0, no augmentation. Every method has the defaults of its problem file at this ε.",
        "",
        f"![Accuracy by epoch]({figure})",
        "",
        "| training | held-out PGD-10, best epoch | last epoch | clean, last | attacked training images, last "
        "| collapsed |",
        "|---|---|---|---|---|---|",
    ]
    for method, runs_of in runs.items():

        def cell(values: Sequence[float]) -> str:
            spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            return f"{100 * statistics.mean(values):.1f}{spread}"

        collapses = [catastrophic_overfitting(lines) for lines in runs_of]
        when = [str(c.after["epoch"]) for c in collapses if c is not None]
        said = f"{len(when)} of {seeds}" + (f" (epoch {', '.join(when)})" if when else "")
        last = [lines[-1] for lines in runs_of]
        lines.append(
            f"| {STYLES[method][0]} | {cell([max(line['robust'] for line in r) for r in runs_of])} "
            f"| {cell([line['robust'] for line in last])} | {cell([line['clean'] for line in last])} "
            f"| {cell([line['train'] for line in last])} | {said} |"
        )
    lines += [
        "",
        "Accuracy in %, mean ± standard deviation over the seeds. A run has collapsed where "
        "`bilevel_at.train.catastrophic_overfitting` says so: held-out PGD accuracy below half of its best so far and "
        "by at least 5 points, while accuracy on the attacked training images has risen.",
    ]
    return "\n".join(lines) + "\n"


def benchmark(
    data_dir: str = "data",
    epsilon: float = 24 / 255,
    methods: tuple[str, ...] = tuple(STYLES),
    seeds: int = 3,
    epochs: int = 15,
    examples: int = 10_000,
    jobs: int | None = None,
    folder: str = "runs/overfitting",
    write: str | None = None,
) -> None:
    """Train each method and compare.

    Args:
        data_dir: where CIFAR-10 lies.
        epsilon: radius.
        methods: which of fgsm, fastat, gradalign, atas, fastbat.
        seeds: seeds 0 … seeds − 1.
        epochs: passes over the training images.
        examples: images to train on, a tenth of which is held out.
        jobs: runs side by side; one for each core if not given.
        folder: where each run's epochs are kept; what is there is not repeated.
        write: a markdown file for the page, with the figure beside it; in the folder if not given.
    """
    unknown = [method for method in methods if method not in STYLES]
    if unknown:
        raise InputError(f"--methods {unknown[0]} is not known; choose from {', '.join(STYLES)}")
    load_data("cifar10", data_dir, download=False)  # says what is missing before anything starts
    place, console = Path(folder), Console()
    place.mkdir(parents=True, exist_ok=True)
    radius = round(255 * epsilon)
    files = {(m, s): place / f"{m}-eps{radius}-{examples}x{epochs}-seed{s}.json" for s in range(seeds) for m in methods}
    missing = [key for key, file in files.items() if not file.exists()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), context) as pool, Progress(console=console) as progress:
        started = {pool.submit(train, m, s, epsilon, data_dir, examples, epochs): (m, s) for m, s in missing}
        task = progress.add_task("runs", total=len(files), completed=len(files) - len(missing))
        for run in as_completed(started):
            key = started[run]
            files[key].write_text(json.dumps(run.result()) + "\n")
            progress.update(task, advance=1, description=f"done: {key[0]}, seed {key[1]}")
    runs = {m: [json.loads(files[m, s].read_text()) for s in range(seeds)] for m in methods}
    page = Path(write) if write is not None else place / "overfitting.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    picture = page.with_suffix(".png")
    draw(runs, picture, epsilon)
    command = f"python benchmarks/overfitting.py --data-dir D --seeds {seeds}"
    page.write_text(document(runs, epsilon, examples, command, picture.name))
    console.print(f"{page} and {picture}")


def command(args: Sequence[str]) -> int:
    about = "Catastrophic overfitting on CIFAR-10, on a CPU."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/overfitting.py", about))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/overfitting.py"))
