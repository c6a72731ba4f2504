"""How strong the attacks are, side by side on adversarially trained digits: docs/results/attacks.md.

    python benchmarks/attacks.py [--seeds 3] [--write docs/results/attacks.md]

Fast-BAT and PGD-7 networks, ``python -m bilevel_at.run`` with its defaults, last epoch; every attack on all 360 test
images at ε = 0.2, drawn anew for each seed. About a quarter of an hour on two cores, half of it AutoAttack. What is
already in ``runs/bench-attacks`` is not repeated.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from pages import at_least_one
from rich.console import Console

import bilevel_at as ba
from bilevel_at import run as main_job
from bilevel_at.commands import flags
from bilevel_at.data import load_data
from bilevel_at.evaluate import Attack, attack_from_name
from bilevel_at.evaluate.stages import Margins
from bilevel_at.runs.evaluations import Store
from bilevel_at.train import RunDir

EPSILON = 0.2
METHODS = ("fastbat", "minmax")


def attacks(seed: int) -> dict[str, tuple[Attack, str]]:
    """(the attack, gradients it takes of an image in ten classes) by what the table calls it."""
    space = ba.LinfBall(EPSILON)

    def beta(name: str, starts: int = 1) -> Attack:
        return Attack(name, space, [Margins(space, 30, EPSILON / 2, starts=starts)])

    published = ba.Targeted(space, steps=30, step=EPSILON / 4)
    return {
        "PGD-50-10": (attack_from_name("pgd-50-10", space), "500"),
        "BETA, RMSprop at ε/4, last step": (Attack.solving("beta-published", published), "270"),
        "BETA, ε/2 falling to 0, any step": (beta("beta-one-start"), "270"),
        "beta-30: five starts within the 30 steps": (attack_from_name("beta-30", space), "270"),
        "beta-30-top3: the nearest three classes first": (attack_from_name("beta-30-top3", space), "at most 270"),
        "beta-30-3": (attack_from_name("beta-30-3", space), "810"),
        "AutoAttack": (attack_from_name("autoattack", space, seed), "at most 1,900, and 5,000 queries"),
    }


def measure(method: str, seed: int, folder: Path) -> dict[str, float]:
    """Accuracy in % by attack, of the run's last epoch."""
    out = folder / f"{method}-{seed}"
    if not (out / "results.json").exists():
        resume = ["--resume"] if (out / "config.json").exists() else []
        names = ["--attacks", "clean", "--seed", str(seed), "--out", str(out), *resume]
        main_job.run([f"problems/{method}.py", *names])
    _, test = load_data("digits")
    store = Store(RunDir(out), "last", ba.load(out, "last"), test, usual=EPSILON, seed=seed)
    return {name: 100 * store.score(attack)[1].accuracy for name, (attack, _) in attacks(seed).items()}


def document(found: dict[str, list[dict[str, float]]], command: str) -> str:
    """The page."""
    seeds = len(next(iter(found.values())))
    lines = [
        "# Attacks side by side",
        "",
        f"`{command}`, {datetime.date.today().isoformat()}, {platform.machine()} CPU, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        f"Accuracy in % on the 360 test digits at ε = {EPSILON}, mean ± standard deviation over {seeds} networks of "
        "each method (last epoch) with draws of their own; lower is a stronger attack. Gradients are those of an image "
        "that nothing breaks.",
        "",
        f"| attack | gradients | {' | '.join(found)} |",
        "|---|---|" + "---|" * len(found),
    ]
    for name, (_, cost) in attacks(0).items():
        cells = []
        for rows in found.values():
            values = [row[name] for row in rows]
            spread = f" ± {statistics.stdev(values):.1f}" if seeds > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {cost} | {' | '.join(cells)} |")
    above = [row["beta-30: five starts within the 30 steps"] - row["AutoAttack"] for r in found.values() for row in r]
    below = [row["PGD-50-10"] - row["beta-30: five starts within the 30 steps"] for r in found.values() for row in r]
    lines += [
        "",
        f"Network by network beta-30 is {min(above):.1f} to {max(above):.1f} points above AutoAttack, and "
        f"{min(below):.1f} to {max(below):.1f} below PGD-50-10 (negative: above).",
    ]
    return "\n".join(lines) + "\n"


def benchmark(seeds: int = 3, folder: str = "runs/bench-attacks", write: str | None = None) -> None:
    """Compare the attacks.

    Args:
        seeds: seeds 0 … seeds − 1.
        folder: where the runs go.
        write: a markdown file for the page; in the folder if not given.
    """
    at_least_one(seeds=seeds)
    found = {method: [measure(method, seed, Path(folder)) for seed in range(seeds)] for method in METHODS}
    page = Path(write) if write is not None else Path(folder) / "attacks.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(document(found, f"python benchmarks/attacks.py --seeds {seeds}"))
    Console().print(f"written to {page}", highlight=False)


def command(args: Sequence[str]) -> int:
    about = "How strong the attacks are, side by side on adversarially trained digits."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/attacks.py", about))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/attacks.py"))
