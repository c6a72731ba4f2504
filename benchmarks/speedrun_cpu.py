"""The best network for 5, 15 and 60 minutes of two cores: real CIFAR-10, ε = 8/255 in ℓ∞, ``small_resnet``.

    python benchmarks/speedrun_cpu.py --data-dir D --write docs/results --minutes 60

It rehearses ``speedrun.py``, which is for a GPU. All compositions have one recipe; a time of m minutes is 2 · 60 · m
processor seconds of training on one thread, and two runs side by side fill two cores. No clock stops a run: seconds of
a step are measured once, for all compositions in turn (``speedrun_cpu_steps.py``), and each trains as many whole
epochs as fit, at least one, with a schedule of that length. The composition with the best accuracy on held-out images
is chosen, never by test images, and all rows are shown. Fast-AT, ATAS and PGD-7 have every time; of the others, those
in the better half on held-out images go on to the next longer one.

Whatever is done is not repeated, so the same command may be given until it says that it is done; its exit status is 3
where ``--minutes`` were up. One seed of 5, 15 and 60 minutes has seven, five and four compositions, and takes 70, 150
and 480 minutes of a core. AutoAttack, which takes about fifteen more for each network, has the baselines' and the one
that is chosen. ``--budgets 5 --no-autoattack`` does the shortest part.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from lines import read
from pages import at_least_one
from parts import slug, without_autoattack
from pieces import in_pieces
from rich.console import Console
from speedrun import ONE_CYCLE
from speedrun_cpu_columns import BASELINES, Column, advancing, columns_of
from speedrun_cpu_steps import CALIBRATION, Rows, calibrate, seconds_of
from speedrun_page import CHEAP, STRONG
from trials import Trial, perform_all

from bilevel_at.commands import flags
from bilevel_at.commands.plan import understand
from bilevel_at.data import load_data
from bilevel_at.errors import InputError, positive

CORES, BATCH = 2, 128
RECIPE = (
    f"--data cifar10 --batch-size {BATCH} {ONE_CYCLE} --weight-decay 5e-4 --augment crop-flip --precision bfloat16 "
    "--memory-format channels_last --select pgd-10-1"
)
COMPOSITIONS = {
    "Fast-AT": "problems/fastat.py",
    "ATAS": "problems/atas.py",
    "PGD-7": "problems/minmax.py --steps 7",
    "Fast-BAT": "problems/fastbat.py",
    "remembered, QUB": "problems/composed.py --anchor remembered --upper qub",
    "from noise, QUB": "problems/composed.py --anchor noise --upper qub",
    "remembered, adaptive, QUB": "problems/composed.py --anchor remembered --adaptive --upper qub",
}


def epochs_in(seconds: float, steps: int, step: float) -> int:
    """How many whole epochs fit into so many seconds, and at least one.

    Args:
        seconds: that there are.
        steps: of an epoch.
        step: seconds of one.
    """
    return max(1, math.floor(seconds / (steps * step)))


def names_of(chosen: Sequence[str]) -> list[str]:
    for name in chosen:
        if name not in COMPOSITIONS:
            raise InputError(f"--compositions {name} is not known; choose from {'; '.join(COMPOSITIONS)}")
    return list(chosen)


def job_of(text: str, model: str, held_out: int, examples: int | None) -> list[str]:
    """The main job's command, without epochs, seed and places."""
    file, *own = text.split()
    job = [file, *RECIPE.split(), *own, "--model", model, "--held-out", str(held_out)]
    return job if examples is None else [*job, "--examples", str(examples)]


def trials_of(
    jobs: dict[str, list[str]], rows: Rows, budget: float, seed: int, steps: int, images: int, data_dir: str
) -> list[Trial]:
    """A trial for each composition.

    Args:
        jobs: commands by composition.
        rows: the calibration.
        budget: minutes of two cores.
        seed: of the runs.
        steps: of an epoch.
        images: test images that are attacked.
        data_dir: where CIFAR-10 lies.
    """
    trials = []
    for name, job in jobs.items():
        epochs = epochs_in(CORES * 60 * budget, steps, seconds_of(rows[name]))
        planned = round(epochs * steps * seconds_of(rows[name]), 1)
        options = understand(job).options
        about = {"composition": name, "text": COMPOSITIONS[name], "budget": budget, "seed": seed, "planned": planned}
        about |= {
            "held_out": options.held_out,
            "proof": options.model != "small_resnet" or options.examples is not None,
        }
        command = (*job, "--epochs", str(epochs), "--seed", str(seed), "--data-dir", data_dir)
        attacks = dict.fromkeys(("clean", CHEAP, STRONG), images)
        trials.append(Trial(f"{budget:g}-minutes-{slug(name)}-{seed}", command, attacks, about))
    return trials


def benchmark(
    data_dir: str = "data",
    budgets: tuple[float, ...] = (5.0, 15.0, 60.0),
    compositions: tuple[str, ...] = tuple(COMPOSITIONS),
    seeds: int = 1,
    autoattack: bool = True,
    jobs: int | None = None,
    model: str = "small_resnet",
    examples: int | None = None,
    held_out: int = 500,
    test_examples: int = 1000,
    folder: str = "runs/speedrun-cpu",
    minutes: float | None = None,
    write: str | None = None,
    page_only: bool = False,
) -> int:
    """Train the compositions for each time, attack them, and write the page.

    Args:
        data_dir: where CIFAR-10 lies.
        budgets: minutes of two cores.
        compositions: by name, of the table in this file; all are trained for the shortest time.
        seeds: seeds 0 … seeds − 1.
        autoattack: of the baselines and the chosen composition, when all of a time are trained.
        jobs: runs side by side; one for each core if not given.
        model: the network.
        examples: train on this many only.
        held_out: training images that are held out, and choose the best row.
        test_examples: the first so many are attacked.
        folder: where the runs go.
        minutes: stop after so many, to go on with the same command.
        write: a folder for the page, its figure, the lines and the calibration; the runs' folder if not given.
        page_only: write the page from the lines that are there, and train nothing.
    """
    at_least_one(seeds=seeds, jobs=jobs, examples=examples, held_out=held_out, test_examples=test_examples)
    for budget in budgets:
        positive("--budgets", budget)
    commands = {name: job_of(COMPOSITIONS[name], model, held_out, examples) for name in names_of(compositions)}
    target = Path(write or folder)
    lines = target / "speedrun.jsonl"

    def columns() -> list[Column]:
        return columns_of(list(read(lines).values()), list(commands))

    def train_all() -> None:
        train, _ = load_data("cifar10", data_dir, download=False)
        if examples is not None:
            train = train.sample(examples)
        rows = calibrate(commands, train, target / CALIBRATION)
        steps = math.ceil((len(train) - held_out) / BATCH)
        for budget in sorted(budgets):
            shorter = [column for column in columns() if column.budget < budget]
            names = advancing(shorter[-1]) if shorter else list(commands)
            some = {name: commands[name] for name in names}
            trials = [
                trial
                for seed in range(seeds)
                for trial in trials_of(some, rows, budget, seed, steps, test_examples, data_dir)
            ]
            perform_all([without_autoattack(trial) for trial in trials], lines, Path(folder), jobs)
            if autoattack:
                (column,) = (column for column in columns() if column.budget == budget)
                attacked = {*BASELINES, column.best}
                trials = [trial for trial in trials if trial.about["composition"] in attacked]
                perform_all(trials, lines, Path(folder), jobs)

    def work() -> None:
        if not page_only:
            train_all()
        from speedrun_cpu_page import write_page  # which imports matplotlib

        write_page(target)
        Console().print(f"done: {target / 'speedrun.md'}", highlight=False)

    return in_pieces(work, minutes)


def command(args: Sequence[str]) -> int:
    about = "The best network for a few minutes of two cores."
    return benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/speedrun_cpu.py", about))


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/speedrun_cpu.py"))
