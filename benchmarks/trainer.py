"""The trainer beside a bare loop of the same steps: what its records, looks and schedules cost.

    python benchmarks/trainer.py [--write docs/results/trainer.md]

Both train the same network with the same problem and solver for a few epochs, in turn in one run; the record is the
median of paired ratios of processor time. Images of CIFAR's size are drawn at random. A few minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from pages import at_least_one, show

import bilevel_at as ba
from bilevel_at.commands import flags
from bilevel_at.data import Images, load_data
from bilevel_at.evaluate import Attack
from bilevel_at.models import build_model
from bilevel_at.runs.problem_file import ProblemFile
from bilevel_at.solvers import ZeroIG
from bilevel_at.train import Trainer

CASES = tuple((model, method) for model in ("small_cnn", "small_resnet") for method in ("fastat", "fastbat"))


def images_of(model: str, examples: int) -> Images:
    """The digits for the digits' network, and noise for the other."""
    if model == "small_cnn":
        digits, _ = load_data("digits")
        return digits[slice(0, examples)]
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (examples, 3, 32, 32), generator=g, dtype=torch.uint8)
    return Images(x, torch.randint(0, 10, (examples,), generator=g), 10)


def trainer_of(model: str, method: str, images: Images, epochs: int) -> Trainer:
    """The method on the network, with its recipe for the digits, or for CIFAR-10 without augmentation."""
    file = ProblemFile(method)
    recipe = file.recipe("digits" if model == "small_cnn" else "cifar10")
    recipe = dataclasses.replace(recipe, epochs=epochs, augment="none")
    torch.manual_seed(0)
    network = build_model(model, images.shape, images.classes)
    solver = ZeroIG() if file.solver is None else file.solver()
    return Trainer(
        file.problem(**recipe.problem), solver, network, images, images[slice(0, 1)], recipe, Attack("clean")
    )


def bare(trainer: Trainer, epochs: int) -> None:
    """What the trainer repeats, and nothing else."""
    x, y = trainer.loader.images.pixels(), trainer.loader.images.y
    generator = torch.Generator().manual_seed(0)
    trainer.model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(trainer.recipe.batch_size):
            trainer.optimizer.zero_grad()
            batch = ba.Batch(x[index], y[index], index)
            trainer.solver.backward(trainer.problem, trainer.model, batch, generator)
            trainer.optimizer.step()


def compare(model: str, method: str, examples: int, epochs: int, repeats: int) -> float:
    """The median of the trainer's time / the bare loop's."""
    images, ratios = images_of(model, examples), []
    for repeat in range(repeats + 1):
        seconds = []
        for one in (lambda t: [t.train_batches(epoch) for epoch in range(epochs)], lambda t: bare(t, epochs)):
            trainer = trainer_of(model, method, images, epochs)
            start = time.process_time()
            one(trainer)
            seconds.append(time.process_time() - start)
        if repeat:  # the first warms up
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def benchmark(repeats: int = 9, examples: int = 2048, epochs: int = 3, write: str | None = None) -> None:
    """Compare the trainer with a bare loop.

    Args:
        repeats: pairs that are timed.
        examples: training images.
        epochs: of each training.
        write: a markdown file to write the table to.
    """
    at_least_one(repeats=repeats, examples=examples, epochs=epochs)
    rows = [(model, method, compare(model, method, examples, epochs, repeats)) for model, method in CASES]
    lines = [
        "# The trainer beside a bare loop",
        "",
        f"`python benchmarks/trainer.py --repeats {repeats} --examples {examples} --epochs {epochs}`; "
        f"{datetime.date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, Python {platform.python_version()}. Batches of 64 digits, and of 128 images of CIFAR's "
        "size.",
        "",
        "| network, method | trainer's processor time / the bare loop's, median of pairs |",
        "|---|---|",
        *(f"| {model}, {method} | {ratio:.3f} |" for model, method, ratio in rows),
    ]
    show(lines, write)


def command(args: Sequence[str]) -> int:
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/trainer.py", "The trainer's own cost."))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/trainer.py"))
