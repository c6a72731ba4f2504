"""What the attack on the nearest classes costs beside AutoAttack, and what it leaves: docs/results/nearest.md.

    python benchmarks/nearest.py [--data-dir D] [--examples 500] [--write docs/results/nearest.md]

Networks of three methods on the digits, ``python -m bilevel_at.run`` with its defaults, and Fast-AT on 10,000 images of
CIFAR-10 with the catalogue's small residual network, last epoch of each. A gradient is one image in one backward pass,
counted where the network is called. About a quarter of an hour on one core. Runs in ``runs/bench-nearest`` are not
trained again.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pages import at_least_one
from rich.console import Console
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at import run as main_job
from bilevel_at.commands import flags
from bilevel_at.data import ImageSet, load_data
from bilevel_at.evaluate import attack_from_name
from bilevel_at.evaluate.robust import attacked

ATTACKS = ("pgd-50-10", "beta-30", "nearest-40-3", "nearest-40-3-2", "autoattack")
OURS = "nearest-40-3-2"


class Count(torch.autograd.Function):
    """The identity. Its backward pass adds the number of images to a counter."""

    @staticmethod
    def forward(context: Any, x: Tensor, counter: Counted) -> Tensor:
        context.counter = counter
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        context.counter.gradients += len(gradients[0])
        return gradients[0], None


class Counted(nn.Module):
    """A network that counts the images in its forward passes and in its backward passes to the input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.gradients, self.passes = network, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        out: Tensor = self.network(Count.apply(x, self) if x.requires_grad else x)
        return out


@dataclass(frozen=True)
class Case:
    """A network to train and attack.

    Args:
        title: of the table's row.
        words: of the run command.
        data: the data set.
        epsilon: the radius.
    """

    title: str
    words: tuple[str, ...]
    data: str
    epsilon: float


def cases(data_dir: str | None) -> list[Case]:
    """The digits' networks, and CIFAR-10's where its data is."""
    digits = [Case(f"digits, {m}", (f"problems/{m}.py",), "digits", 0.2) for m in ("fastat", "fastbat", "minmax")]
    if data_dir is None:
        return digits
    words = ["--data", "cifar10", "--data-dir", data_dir, "--model", "small_resnet", "--examples", "10000"]
    words += ["--epochs", "12", "--batch-size", "64", "--lr", "0.1", "--select", "pgd-5-1", "--test-examples", "100"]
    return [*digits, Case("CIFAR-10, fastat, small_resnet", ("problems/fastat.py", *words), "cifar10", 8 / 255)]


def train(case: Case, folder: Path) -> Path:
    """The run of this network in the folder, trained if it is not there."""
    out = folder / case.title.replace(", ", "-").replace(" ", "-")
    if not (out / "results.json").exists():
        resume = ["--resume"] if (out / "config.json").exists() else []
        main_job.run([*case.words, "--attacks", "clean", "--out", str(out), *resume])
    return out


def measure(case: Case, folder: Path, data_dir: str | None, examples: int) -> dict[str, tuple[float, float, float]]:
    """Attack -> (accuracy, gradients of an image, forward passes of an image)."""
    out = train(case, folder)
    images: ImageSet = load_data(case.data, data_dir or "data", download=False)[1]
    images = images.sample(examples) if examples < len(images) else images
    rows = {}
    for name in ATTACKS:
        network = Counted(ba.load(out, "last")).eval()
        trace = attacked(network, images, attack_from_name(name, case.epsilon))
        accuracy = trace.correct.float().mean().item()
        rows[name] = (accuracy, network.gradients / len(images), network.passes / len(images))
        line = f"{case.title}  {name}  {accuracy:.2%}  {rows[name][1]:.0f} gradients an image  ({trace.seconds:.0f} s)"
        Console().print(line, highlight=False)
    return rows


def document(results: dict[str, dict[str, tuple[float, float, float]]], sizes: dict[str, int], command: str) -> str:
    """The page."""
    lines = [
        "# The nearest classes beside AutoAttack",
        "",
        f"`{command}`, {datetime.date.today().isoformat()}, {platform.machine()} CPU, {os.cpu_count()} cores, 1 "
        f"process, torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        "Accuracy in % (lower is a stronger attack), and gradients: backward passes to an image, the mean over all "
        "images with those that fall early, counted in the network. AutoAttack's square makes forward passes besides, "
        "which are not in this count: all forward passes stand in brackets. Last epoch of each network.",
        "",
        f"| network | images | {' | '.join(ATTACKS)} |",
        "|---|---|" + "---|" * len(ATTACKS),
    ]
    for title, rows in results.items():
        cells = [f"{100 * rows[a][0]:.1f}, {rows[a][1]:.0f} ({rows[a][2]:,.0f})" for a in ATTACKS]
        lines.append(f"| {title} | {sizes[title]} | {' | '.join(cells)} |")
    lines += ["", f"| network | {OURS} above AutoAttack, points | its gradients, as a share of AutoAttack's |"]
    lines.append("|---|---|---|")
    for title, rows in results.items():
        above, share = rows[OURS][0] - rows["autoattack"][0], rows[OURS][1] / rows["autoattack"][1]
        lines.append(f"| {title} | {100 * above:+.1f} | 1/{1 / share:.1f} |")
    return "\n".join(lines) + "\n"


def benchmark(
    data_dir: str | None = None, examples: int = 500, folder: str = "runs/bench-nearest", write: str | None = None
) -> None:
    """Compare the attacks.

    Args:
        data_dir: where CIFAR-10 lies; only the digits if not given.
        examples: test images, or all if there are fewer.
        folder: where the runs go.
        write: a markdown file for the page; in the folder if not given.
    """
    at_least_one(examples=examples)
    torch.set_num_threads(1)
    results, sizes = {}, {}
    for case in cases(data_dir):
        results[case.title] = measure(case, Path(folder), data_dir, examples)
        sizes[case.title] = min(examples, len(load_data(case.data, data_dir or "data", download=False)[1]))
    page = Path(write) if write is not None else Path(folder) / "nearest.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/nearest.py{' --data-dir D' if data_dir else ''} --examples {examples}"
    page.write_text(document(results, sizes, command))
    Console().print(f"written to {page}", highlight=False)


def command(args: Sequence[str]) -> int:
    about = "What the attack on the nearest classes costs beside AutoAttack, and what it leaves."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/nearest.py", about))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/nearest.py"))
