"""Catastrophic overfitting on CIFAR-10: at what ε and for which composition, and does anything warn an epoch ahead?

    python benchmarks/overfitting.py --data-dir D --write docs/results --minutes 60

Nine compositions (``overfitting_runs.py``), four ε and three seeds train a narrow residual network on 10,000 images.
FGSM from 0 can teach it to recognise the attack: accuracy on attacked training images rises while held-out PGD accuracy
collapses. After each epoch, what could warn is measured on held-out images: gradient alignment, free coordinates, the
implicit term's share and cosine, gradient norms, and gaps of accuracies. The page asks how well each of them, and its
change, tells a collapse in the next epoch (``overfitting_warnings.py``).

One line of JSON for each run in ``overfitting.jsonl`` beside the page, which is written from those lines alone.
Whatever is done is not repeated, and a run that was cut off goes on after its last epoch, so the same command may be
given until it says that it is done; its exit status is 3 where ``--minutes`` were up. About four hours of a core;
``--methods fgsm fastat --epsilons 16/255`` does a part of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lines import read, side_by_side
from overfitting_runs import COMPOSITIONS, Run, perform
from pages import at_least_one
from pieces import in_pieces
from rich.console import Console

from bilevel_at.commands import flags
from bilevel_at.data import load_data
from bilevel_at.errors import InputError, positive

EPSILONS = (16 / 255, 20 / 255, 22 / 255, 24 / 255)  # at 32/255 FGSM never learns what it could lose


def missing(run: Run, records: Mapping[str, Any]) -> bool:
    """Whether there is no line of the same settings."""
    record = records.get(run.key)
    return record is None or record["settings"] != run.settings


def perform_all(runs: Sequence[Run], lines: Path, data_dir: str, folder: Path, jobs: int | None) -> None:
    """Perform those that are missing, in order.

    Raises:
        BilevelError: after all others are done, where one could not be.
    """
    records = read(lines)
    todo = [run for run in runs if missing(run, records)]
    folder.mkdir(parents=True, exist_ok=True)
    side_by_side(perform, [[(run.key, (run, data_dir, folder)) for run in todo]], lines, len(runs), jobs)


def benchmark(
    data_dir: str = "data",
    methods: tuple[str, ...] = tuple(COMPOSITIONS),
    epsilons: tuple[float, ...] = EPSILONS,
    seeds: int = 3,
    epochs: int = 15,
    examples: int = 10_000,
    jobs: int | None = None,
    folder: str = "runs/overfitting",
    minutes: float | None = None,
    write: str | None = None,
    page_only: bool = False,
) -> int:
    """Train, measure after each epoch, and write the page.

    Args:
        data_dir: where CIFAR-10 lies.
        methods: which of fgsm, fastat, nfgsm, atta, atas, gradalign, unsigned, fastbat, fgsm-qub.
        epsilons: radii.
        seeds: seeds 0 … seeds − 1.
        epochs: passes over the training images.
        examples: images to train on, a tenth of which is held out.
        jobs: runs side by side; one for each core if not given.
        folder: where runs are kept until they are done.
        minutes: stop after so many, to go on with the same command.
        write: a folder for the page, its figure and the lines; the runs' folder if not given.
        page_only: write the page from the lines that are there, and train nothing.
    """
    at_least_one(seeds=seeds, epochs=epochs, examples=examples, jobs=jobs)
    for method in methods:
        if method not in COMPOSITIONS:
            raise InputError(f"--methods {method} is not known; choose from {', '.join(COMPOSITIONS)}")
    for epsilon in epsilons:
        if positive("--epsilons", epsilon) > 1:
            raise InputError(f"--epsilons has {epsilon:g}, and images are in [0, 1]; give {epsilon:g}/255")
    target = Path(write or folder)
    lines = target / "overfitting.jsonl"
    # The largest ε first, where collapses are to be expected; a seed is whole before the next one begins.
    runs = [
        Run(method, round(255 * epsilon, 6), seed, epochs, examples)
        for seed in range(seeds)
        for epsilon in sorted(epsilons, reverse=True)
        for method in methods
    ]
    if not page_only:
        load_data("cifar10", data_dir, download=False)  # says what is missing before anything is trained

    def work() -> None:
        if not page_only:
            perform_all(runs, lines, data_dir, Path(folder), jobs)
        from overfitting_page import write_page

        records = [r for r in read(lines).values() if not missing(Run(**asked(r)), {r["key"]: r})]
        records = [r for r in records if (r["settings"]["epochs"], r["settings"]["examples"]) == (epochs, examples)]
        if not records:
            raise InputError(f"{lines} has no run of {epochs} epochs on {examples} images; leave out --page-only")
        write_page(records, target, "python benchmarks/overfitting.py --data-dir D --write docs/results")
        Console().print(f"done: {target / 'overfitting.md'}", highlight=False)

    return in_pieces(work, minutes)


def asked(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of its run."""
    return {name: record["settings"][name] for name in ("method", "epsilon", "seed", "epochs", "examples")}


def command(args: Sequence[str]) -> int:
    about = "Catastrophic overfitting on CIFAR-10: where it sets in, and what warns of it."
    return benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/overfitting.py", about))


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/overfitting.py"))
