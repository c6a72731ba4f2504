"""What attacks cost beside those of others at equal settings: docs/results/attack-time.md.

    python benchmarks/attack_time.py [--data-dir D] [--examples 500] [--write docs/results/attack-time.md]

PGD-50-1 and PGD-50-10 by this library, a bare loop, torchattacks and foolbox (``pip install foolbox``, ``pip install
--no-deps torchattacks``), in turn in one process, on the same images in the same batches; then this library's strong
attacks beside AutoAttack. The record is the ratio of processor times. Networks are those of ``benchmarks/nearest.py``,
trained if they are not in ``runs/bench-nearest``. Three minutes on one core, and with CIFAR-10 half an hour.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from nearest import Case, Counted, cases, train
from pages import at_least_one, show
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.commands import flags
from bilevel_at.data import load_data
from bilevel_at.errors import InputError
from bilevel_at.evaluate import Attack, attack_from_name
from bilevel_at.evaluate.robust import attacked

BATCH = 250
# How each is installed: torchattacks would hold requests at 2.25, and with it urllib3 at 1.26.
PEERS = {"torchattacks": "--no-deps torchattacks", "foolbox": "foolbox"}
STRONG = ("beta-30", "nearest-40-3-2", "autoattack")
Correct = Callable[[nn.Module, Tensor, Tensor, float, int], Tensor]
"""(network, images, labels, ε, restarts) -> whether each image withstands PGD-50, ``[B]``."""


def ours(attack_of: Callable[[Attack], Attack] = lambda attack: attack) -> Correct:
    """This library's PGD, or a variant of it."""

    def correct(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, restarts: int) -> Tensor:
        attack = attack_of(attack_from_name(f"pgd-50-{restarts}", epsilon))
        return attacked(model, ba.data.Images(x, y, 10), attack, batch_size=BATCH).correct

    return correct


def all_steps(attack: Attack) -> Attack:
    """The same, with every step taken though the iterates of an image go in a cycle."""
    return replace(attack, stages=[replace(stage, cycles=False) for stage in attack.stages])


def standing(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether each image is classified correctly as it is, ``[B]``; nobody is to attack the others."""
    return torch.cat([model(part).argmax(1) for part in x.split(BATCH)]) == y


def bare(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, restarts: int) -> Tensor:
    """PGD as short as it can be written; a restart is for the images that nothing has broken yet."""
    correct = standing(model, x, y)
    for _ in range(restarts):
        for rows in correct.nonzero().flatten().split(BATCH):
            clean, label = x[rows], y[rows]
            low, high = (clean - epsilon).clamp(min=0), (clean + epsilon).clamp(max=1)
            z = low + (high - low) * torch.rand_like(clean)
            for _ in range(50):
                z.requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(model(z), label, reduction="sum"), z)
                z = (z.detach() + epsilon / 4 * gradient.sign()).clamp(low, high)
            correct[rows] = model(z).argmax(1) == label
    return correct


def by_torchattacks(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, restarts: int) -> Tensor:
    """torchattacks' PGD; MultiAttack restarts on what is left, as we do."""
    torchattacks: Any = import_module("torchattacks")
    attack = torchattacks.PGD(model, eps=epsilon, alpha=epsilon / 4, steps=50)
    if restarts > 1:
        attack = torchattacks.MultiAttack([attack] * restarts)
    correct = standing(model, x, y)
    for rows in correct.nonzero().flatten().split(BATCH):
        correct[rows] = model(attack(x[rows], y[rows])).argmax(1) == y[rows]
    return correct


def by_foolbox(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, restarts: int) -> Tensor:
    """foolbox's LinfPGD; its restarts are of every image that it is given, broken or not."""
    foolbox: Any = import_module("foolbox")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=epsilon / 4, steps=50).repeat(restarts)
    network = foolbox.PyTorchModel(model, bounds=(0, 1))
    correct = standing(model, x, y)
    for rows in correct.nonzero().flatten().split(BATCH):
        correct[rows] = ~attack(network, x[rows], y[rows], epsilons=epsilon)[2]
    return correct


SIDES: dict[str, Correct] = {
    "this library": ours(),
    "this library, every step taken": ours(all_steps),
    "a bare loop": bare,
    "torchattacks": by_torchattacks,
    "foolbox": by_foolbox,
}


def compare(
    sides: dict[str, Correct], model: nn.Module, x: Tensor, y: Tensor, epsilon: float, repeats: int
) -> list[str]:
    """Rows of the first table: time / this library's, images seen / image, and accuracy, for 1 and 10 restarts."""
    rows = {side: side for side in sides}
    for restarts in (1, 10):
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        seen = {}
        for _ in range(repeats):
            for side, correct in sides.items():
                network = Counted(model).eval()
                start = time.process_time()
                accuracy = correct(network, x, y, epsilon, restarts).float().mean().item()
                seconds[side].append(time.process_time() - start)
                seen[side] = (network.gradients / len(x), accuracy)
        for side, each in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(each, seconds["this library"], strict=True))
            rows[side] += f" | {ratio:.2f} | {seen[side][0]:.0f} | {100 * seen[side][1]:.1f}"
    return [f"| {row} |" for row in rows.values()]


def strong(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> list[str]:
    """Rows of the second table: time / AutoAttack's, gradients an image, and accuracy."""
    rows = []
    for name in STRONG:
        network = Counted(model).eval()
        start = time.process_time()
        trace = attacked(network, ba.data.Images(x, y, 10), attack_from_name(name, epsilon), batch_size=BATCH)
        seconds = time.process_time() - start
        rows.append((name, seconds, network.gradients / len(x), 100 * trace.correct.float().mean().item()))
    whole = rows[-1][1]
    return [f"| {name} | {s / whole:.3f} | {g:.0f} | {accuracy:.1f} |" for name, s, g, accuracy in rows]


def section(
    case: Case, sides: dict[str, Correct], folder: Path, data_dir: str | None, examples: int, repeats: int
) -> list[str]:
    """Both tables for a network."""
    model = ba.load(train(case, folder), "last").eval().requires_grad_(False)
    test = load_data(case.data, data_dir or "data", download=False)[1]
    x, y = test[slice(0, examples)].pixels(), test.y[:examples]
    return [
        "",
        f"## {case.title}: {len(x)} test images, ε = {case.epsilon:.3g}",
        "",
        "| PGD by | 50-1: time | gradients | accuracy | 50-10: time | gradients | accuracy |",
        "|---|---|---|---|---|---|---|",
        *compare(sides, model, x, y, case.epsilon, repeats),
        "",
        "| attack | time / AutoAttack's | gradients | accuracy |",
        "|---|---|---|---|",
        *strong(model, x, y, case.epsilon),
    ]


def benchmark(
    data_dir: str | None = None,
    examples: int = 500,
    repeats: int = 5,
    peers: tuple[str, ...] = tuple(PEERS),
    networks: tuple[str, ...] = ("fastbat", "cifar"),
    folder: str = "runs/bench-nearest",
    write: str | None = None,
) -> None:
    """Compare attacks in time and accuracy.

    Args:
        data_dir: where CIFAR-10 lies; only the digits if not given.
        examples: test images, or all if there are fewer.
        repeats: how often each is timed.
        peers: torchattacks, foolbox.
        networks: words of the titles of benchmarks/nearest.py's networks, in lower case.
        folder: where their runs are.
        write: a markdown file for the page.
    """
    at_least_one(examples=examples, repeats=repeats)
    for peer in peers:
        if peer not in PEERS:
            raise InputError(f"--peers {peer} is not known; choose from {', '.join(PEERS)}")
        if find_spec(peer) is None:
            how = f"pip install {PEERS[peer]}"
            raise InputError(f"{peer} is not installed; {how}, or leave it out of --peers")
    torch.set_num_threads(1)
    chosen = [case for case in cases(data_dir) if any(word in case.title.lower() for word in networks)]
    if not chosen:
        titles = ", ".join(case.title for case in cases("D"))
        raise InputError(f"--networks {' '.join(networks)} is in no title; titles are {titles}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *peers))
    sides = {side: correct for side, correct in SIDES.items() if side not in PEERS or side in peers}
    lines = [
        "# Attacks beside those of others, in time",
        "",
        f"`python benchmarks/attack_time.py{' --data-dir D' if data_dir else ''} --examples {examples} --repeats "
        f"{repeats} --networks {' '.join(networks)}`; {datetime.date.today()}, {platform.machine()} CPU, 1 thread, "
        f"{versions}.",
        "",
        "Time: processor time / this library's, the median of the pairs. Gradients: backward passes to an image, the "
        "mean over all images. Accuracy in %. Uniform starts, steps of ε/4, the last iterate counts, batches of "
        f"{BATCH}, of the images that are classified correctly without an attack. foolbox restarts on all of these, "
        "the others on those that are left. This library leaves an image whose iterates go in a cycle, where the "
        "result is known; the row with every step taken is without that.",
    ]
    with Progress() as progress:
        for case in progress.track(chosen, description="networks"):
            lines += section(case, sides, Path(folder), data_dir, examples, repeats)
    show(lines, write)


def command(args: Sequence[str]) -> int:
    about = "What attacks cost beside those of others at equal settings."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/attack_time.py", about))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/attack_time.py"))
