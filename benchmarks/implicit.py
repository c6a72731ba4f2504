"""Where the implicit term of Fast-BAT matters, and why the exact hypergradient does harm: the page implicit.md.

    python benchmarks/implicit.py --write docs/results --minutes 60

On the digits, with their usual recipe: the step 1/λ from the published 20, where most coordinates of δ* are at a bound,
to 0.3, where most are free; the weight of the implicit term from 0 over the published 0.1 λ to 1, the exact
hypergradient; two ε. Beside them what could explain the harm: another anchor, a network without kinks, the derivative
through the anchor, noise as long as the term, smaller rates, and training that goes on from a network that was trained
without the term. The last epoch is attacked; nothing is chosen by test images. One line of JSON for each run in
``implicit.jsonl``, and the page is written from those lines alone.

Whatever is done is not repeated, so the same command may be given until it says that it is done; its exit status is 3
where ``--minutes`` were up. About forty minutes of a core.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from implicit_runs import Run, perform_all
from lines import read
from pages import at_least_one
from pieces import in_pieces
from rich.console import Console

from bilevel_at.commands import flags
from bilevel_at.errors import InputError

STEPS = {20.0: (0.1, 0.3), 5.0: (0.3,), 1.25: (), 0.3: ()}
"""Weights by 1/λ, besides 0, the published 0.1 λ and 1."""
SLOW = 60  # epochs at smaller rates
MORE = 10  # epochs that go on from a trained network
GROUPS = (("scan", "causes", "after"), ("rates",), ("smaller",))
"""Parts that are done seed by seed, one group after the other."""
PARTS = tuple(part for group in GROUPS for part in group)
FEW = 3  # seeds of smaller rates and of the smaller ε


def scan(seed: int) -> Iterator[Run]:
    """1/λ by weight."""
    for step, more in STEPS.items():
        for weight in sorted({0.0, 0.1 / step, *more, 1.0}):
            measured = weight in (0, 1) and seed < (FEW if step in (20, 0.3) else 1)
            yield Run("scan", step, weight, seed, lengths=measured)


def smaller(seed: int) -> Iterator[Run]:
    """The same at half of ε, without the weights between."""
    for step in STEPS:
        for weight in (0.0, *([0.1 / step] if step == 20 else []), 1.0):
            yield Run("smaller", step, weight, seed, epsilon=0.1)


def causes(seed: int) -> Iterator[Run]:
    """What else could explain the harm, at the published step."""
    for weight in (0.0, 1.0):
        yield Run("causes", 20.0, weight, seed, anchor="uniform")
        yield Run("causes", 20.0, weight, seed, activation="swish", lengths=seed < FEW)
    yield Run("causes", 20.0, 1.0, seed, term="through")
    yield Run("causes", 20.0, 1.0, seed, term="noise")
    yield Run("causes", 20.0, 1.0, seed, term="coin")


def base(seed: int, activation: str = "relu") -> Run:
    """The run without the term whose network others go on from."""
    part = "scan" if activation == "relu" else "causes"
    return Run(part, 20.0, 0.0, seed, activation=activation, lengths=seed < FEW)


def after(seed: int) -> Iterator[Run]:
    """From the network that was trained without the term."""
    for lr in (0.1, 0.01, 0.001):
        for weight in (0.0, 1.0):
            yield Run("after", 20.0, weight, seed, lr=lr, epochs=MORE, after=base(seed).key)
    for lr in (0.1, 0.01):
        yield Run("after", 20.0, 1.0, seed, term="noise", lr=lr, epochs=MORE, after=base(seed).key)
        yield Run("after", 20.0, 1.0, seed, term="coin", lr=lr, epochs=MORE, after=base(seed).key)
    yield Run("after", 20.0, 1.0, seed, term="through", epochs=MORE, after=base(seed).key)
    smooth = base(seed, "swish").key
    for lr in (0.1, 0.01):
        for weight in (0.0, 1.0):
            yield Run("after", 20.0, weight, seed, activation="swish", lr=lr, epochs=MORE, after=smooth)


def rates(seed: int) -> Iterator[Run]:
    """A smaller rate with more epochs."""
    for weight in (0.0, 1.0):
        yield Run("rates", 20.0, weight, seed, lr=0.03, epochs=SLOW)


def runs_of(parts: Sequence[str], seeds: int, epochs: int | None) -> list[Run]:
    """A network comes before the runs that go on from it."""
    makers = {"scan": scan, "causes": causes, "after": after, "rates": rates, "smaller": smaller}
    runs = [
        run
        for group in GROUPS
        for seed in range(seeds if group == GROUPS[0] else min(seeds, FEW))
        for part in group
        if part in parts
        for run in makers[part](seed)
    ]
    if epochs is None:
        return runs
    shorter = [replace(run, epochs=epochs) for run in runs]
    return [
        replace(run, after=run.after and replace(base(run.seed, run.activation), epochs=epochs).key) for run in shorter
    ]


def benchmark(
    parts: tuple[str, ...] = PARTS,
    seeds: int = 5,
    epochs: int | None = None,
    examples: int | None = None,
    jobs: int | None = None,
    folder: str = "runs/implicit",
    minutes: float | None = None,
    write: str | None = None,
    page_only: bool = False,
) -> int:
    """Train, measure and attack, and write the page.

    Args:
        parts: which of scan, causes, after, rates, smaller.
        seeds: seeds 0 … seeds − 1; at most three of rates and smaller.
        epochs: of every run; 30, 60 of rates and 10 of after if not given.
        examples: use that many training and test images; all if not given.
        jobs: runs side by side; one for each core if not given.
        folder: where the networks go.
        minutes: stop after so many, to go on with the same command.
        write: a folder for the page, its figure and the lines; the networks' folder if not given.
        page_only: write the page from the lines that are there, and train nothing.
    """
    at_least_one(seeds=seeds, epochs=epochs, examples=examples, jobs=jobs)
    for part in parts:
        if part not in PARTS:
            raise InputError(f"--parts {part} is not known; choose from {', '.join(PARTS)}")
    if "after" in parts and not {"scan", "causes"} <= set(parts):
        raise InputError("--parts after goes on from networks of scan and causes; give all three")
    target, runs = Path(write or folder), runs_of(parts, seeds, epochs)

    def work() -> None:
        if not page_only:
            perform_all(runs, target / "implicit.jsonl", Path(folder), examples, jobs)
        from implicit_page import write_page

        write_page(list(read(target / "implicit.jsonl").values()), target)
        Console().print(f"done: {target / 'implicit.md'}", highlight=False)

    return in_pieces(work, minutes)


def command(args: Sequence[str]) -> int:
    about = "Where the implicit term of Fast-BAT matters."
    return benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/implicit.py", about))


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/implicit.py"))
