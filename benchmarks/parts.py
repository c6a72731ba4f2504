"""What each part of a method is worth: one recipe, parts exchanged one at a time, and compositions of them.

    python benchmarks/parts.py --data-dir D --write docs/results --minutes 60

Each row is ``problems/composed.py`` with the flags that ``parts_rows.py`` gives it; it differs from the row that it is
compared with by one part. On the digits (ε = 0.2, their usual recipe, five seeds) and on 10,000 training images of
CIFAR-10 with ``small_resnet`` (ε = 8/255 and 16/255, three seeds). The last epoch is attacked; nothing is chosen by
test images. One line of JSON for each run in ``parts.jsonl``, and the page is written from those lines alone.

Whatever is done is not repeated, so the same command may be given until it says that it is done; its exit status is 3
where ``--minutes`` were up. The digits take two hours of two cores, CIFAR-10 six. ``--sets digits --rows PGD-2 QUB
--seeds 2`` does a part of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lines import read
from pages import at_least_one
from parts_page import write_page
from parts_rows import ROWS, Row
from parts_settings import SETTINGS, Setting
from pieces import in_pieces
from rich.console import Console
from trials import Trial, perform_all

from bilevel_at.commands import flags
from bilevel_at.data import load_data
from bilevel_at.errors import InputError


def slug(name: str) -> str:
    """A row's name as that of a folder."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name.replace("ε", "eps").replace("λ", "lam"))


def trial(setting: Setting, row: Row, seed: int, data_dir: str) -> Trial:
    job = ["problems/composed.py", *setting.flags.split(), "--epsilon", repr(setting.epsilon)]
    job += [*row.of(setting.epsilon, setting.epochs), "--seed", str(seed)]
    if setting.name != "digits":
        job += ["--data-dir", data_dir]
    about = {"row": row.name, "setting": setting.name, "seed": seed}
    return Trial(f"{setting.name}-{slug(row.name)}-{seed}", tuple(job), setting.attacks, about)


def without_autoattack(trial: Trial) -> Trial:
    return replace(trial, attacks={name: n for name, n in trial.attacks.items() if name != "autoattack"})


def benchmark(
    data_dir: str = "data",
    sets: tuple[str, ...] = tuple(SETTINGS),
    rows: tuple[str, ...] = tuple(ROWS),
    seeds: int | None = None,
    jobs: int | None = None,
    folder: str = "runs/parts",
    minutes: float | None = None,
    write: str | None = None,
    page_only: bool = False,
) -> int:
    """Train and attack the rows, and write the page.

    Args:
        data_dir: where CIFAR-10 lies.
        sets: which of digits, cifar10-8, cifar10-16.
        rows: which rows, by name.
        seeds: seeds 0 … seeds − 1; five on the digits and three on CIFAR-10 if not given.
        jobs: runs side by side; one for each core if not given.
        folder: where the runs go.
        minutes: stop after so many, to go on with the same command.
        write: a folder for the page, its figure and the lines; the runs' folder if not given.
        page_only: write the page from the lines that are there, and train nothing.
    """
    at_least_one(seeds=seeds, jobs=jobs)
    for flag, values, known in (("sets", sets, SETTINGS), ("rows", rows, ROWS)):
        for value in values:
            if value not in known:
                raise InputError(f"--{flag} {value} is not known; choose from {'; '.join(known)}")
    chosen = [SETTINGS[name] for name in sets]
    target = Path(write or folder)
    lines = target / "parts.jsonl"
    if not page_only and any(setting.name != "digits" for setting in chosen):
        load_data("cifar10", data_dir, download=False)  # says what is missing before anything is trained
    trials = [
        trial(setting, ROWS[name], seed, data_dir)
        for setting in chosen
        for seed in range(seeds or setting.seeds)
        for name in rows
    ]

    def work() -> None:
        if not page_only:
            perform_all([without_autoattack(trial) for trial in trials], lines, Path(folder), jobs)
            perform_all(trials, lines, Path(folder), jobs)  # which takes as long as all the rest
        write_page(list(read(lines).values()), target)
        Console().print(f"done: {target / 'parts.md'}", highlight=False)

    return in_pieces(work, minutes)


def command(args: Sequence[str]) -> int:
    about = "What each part of a method is worth."
    return benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/parts.py", about))


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/parts.py"))
