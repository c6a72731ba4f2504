"""ImageNet on several GPUs, on paper: what each remembers, sends and computes: docs/results/processes.md.

    python benchmarks/processes.py [--gpus 8 64] [--write docs/results/processes.md]

Operations, bytes and collectives are counted on the network itself (torchvision's ResNet-50, 224×224, 1000 classes),
the imbalance of dealing by example is computed exactly, and JPEG decoding was measured by ``benchmarks/scaling.py``.
Rates of the machines are flags: nothing here was measured on a GPU. Half a minute.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from pages import at_least_one, show
from scipy.signal import fftconvolve
from scipy.stats import poisson
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at import distributed, shares
from bilevel_at.commands import flags
from bilevel_at.diagnose.cost import StepCost, estimate
from bilevel_at.errors import positive
from bilevel_at.models import imagenet
from bilevel_at.solvers import HessianFreeKKT, ZeroIG

EXAMPLES = 1_281_167  # ImageNet-1k's training images
SHAPE = (3, 224, 224)
BATCHES = (256, 512, 1024, 2048, 4096, 8192)
EPSILON = 2 / 255
METHODS: dict[str, tuple[str, dict[str, Any], ba.Solver]] = {
    "Fast-AT": ("fastat", {}, ZeroIG()),
    "ATAS, kept at 32×32": ("atas", {"size": 32}, ZeroIG()),
    "Fast-BAT": ("fastbat", {}, HessianFreeKKT()),
    "Fast-BAT, remembered": ("remembered_fastbat", {}, HessianFreeKKT()),
    "Fast-BAT, remembered at 32×32": ("remembered_fastbat", {"size": 32}, HessianFreeKKT()),
}
WORKERS = Path(__file__).resolve().parents[1] / "docs/results/scaling-workers.json"


def network() -> nn.Module:
    return imagenet.imagenet_resnet(50, SHAPE, 1000)


def composed(name: str) -> tuple[ba.BilevelProblem, ba.Solver]:
    file, arguments, solver = METHODS[name]
    problem = import_module(f"bilevel_at.problems.{file}").problem(epsilon=EPSILON, **arguments)
    return problem, solver


def cost(name: str, examples: int = 2) -> StepCost:
    """A step's cost on the meta device, in an epoch after the warm-up."""
    labels = torch.empty(examples, dtype=torch.long, device="meta")
    batch = ba.Batch(torch.empty(examples, *SHAPE, device="meta"), labels, labels)
    problem, solver = composed(name)
    return estimate(problem, solver, network(), batch, examples=EXAMPLES, epoch=10, epochs=90)


def collectives(name: str) -> tuple[int, int]:
    """(sums over processes, bytes in them) of synchronised statistics in one step, counted in a step of two images."""
    problem, solver = composed(name)
    model = network()
    distributed.synchronise(model)
    sent: list[int] = []
    index = torch.arange(2)
    batch = ba.Batch(torch.rand(2, 3, 64, 64), index, index, examples=2)

    def summed(tensor: Tensor) -> Tensor:
        sent.append(tensor.nbytes)
        return tensor.detach().clone()

    of_two = mock.patch.multiple(shares, _count=2, summed=summed)  # the other of which is not there
    errors = mock.patch("bilevel_at.solver.raised_alike", lambda model, function: function())
    with shares.sharing(shares.Share(index, 2, False)), of_two, errors:
        solver.backward(problem, model, batch, torch.Generator().manual_seed(0))
    return len(sent), sum(sent)


def expected_largest(batch: int, processes: int) -> float:
    """E max_r b_r of a batch whose examples belong to processes at random: multinomial, exactly.

    As N independent Poisson numbers, given their sum: P(max ≤ m) = P(all ≤ m, Σ = B) / P(Σ = B).
    """
    mean = batch / processes
    pmf = poisson.pmf(np.arange(batch + 1), mean)
    total = poisson.pmf(batch, batch)
    expected, m = 0.0, 0
    while True:
        below = _power(np.where(np.arange(batch + 1) <= m, pmf, 0), processes)[batch] / total if m >= mean else 0.0
        if below > 1 - 1e-9:
            return expected
        expected += 1 - max(below, 0.0)  # E max = Σ_m P(max > m)
        m += 1


def _power(pmf: np.ndarray, times: int) -> np.ndarray:
    """The distribution of the sum of ``times`` numbers, up to the length of ``pmf``."""
    if times == 1:
        return pmf
    half = _power(pmf, times // 2)
    both = fftconvolve(half, half)[: len(pmf)]
    return fftconvolve(both, pmf)[: len(pmf)] if times % 2 else both


def decoded() -> float:
    """Images a second that one process decodes, as measured for docs/results/scaling.md."""
    return statistics.median(json.loads(WORKERS.read_text())["axis"]["lines"][0]["samples"][0])


def benchmark(
    gpus: tuple[int, ...] = (8, 64),
    per_gpu: tuple[int, ...] = (32, 64, 128),
    machine: int = 8,
    peak: float = 494.0,
    utilisation: float = 0.1,
    inside: float = 450.0,
    between: float = 50.0,
    latency: float = 20.0,
    write: str | None = None,
) -> None:
    """Print the page.

    Args:
        gpus: numbers of GPUs.
        per_gpu: examples of a batch on each.
        machine: GPUs in one machine.
        peak: an assumption: a GPU's peak, TFLOP/s (an H100's in TF32, from its data sheet).
        utilisation: an assumption: the share of it that training reaches.
        inside: an assumption: GB/s that a GPU sends to another one of its machine.
        between: an assumption: GB/s that a GPU sends to one of another machine.
        latency: an assumption: microseconds of a step of a ring, or of a small sum over processes.
        write: a markdown file to write the page to.
    """
    for numbers, flag in ((gpus, "gpus"), (per_gpu, "per_gpu"), ((machine,), "machine")):
        for number in numbers:
            at_least_one(**{flag: number})
    for flag, rate in {"peak": peak, "utilisation": utilisation, "inside": inside, "between": between}.items():
        positive(f"--{flag}", rate)
    positive("--latency", latency)
    costs = {name: cost(name) for name in METHODS}
    model = network()
    sizes = [sum(p.nbytes for p in bucket) for bucket in distributed._buckets(list(model.parameters()))]

    def ring(n: int) -> float:
        """Seconds of the gradients' reduction: 2 (N − 1)/N · bytes / bandwidth, and 2 (N − 1) hops for each bucket."""
        speed = (inside if n <= machine else between) * 1e9
        return 2 * (n - 1) / n * sum(sizes) / speed + len(sizes) * 2 * (n - 1) * latency * 1e-6

    def compute(name: str, examples: float) -> float:
        return costs[name].flops / 2 * examples / (peak * 1e12 * utilisation)

    shown = "`python benchmarks/processes.py`"
    lines = [
        "# ImageNet on several GPUs, on paper",
        "",
        f"{shown}; {datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}. ResNet-50, "
        f"{EXAMPLES:,} images of 3×224×224, ε = 2/255. Counted: operations, bytes, sums over processes, imbalance. "
        f"Assumed, not measured: {peak:g} TFLOP/s a GPU, of which {utilisation:.0%} is reached; {inside:g} GB/s "
        f"between GPUs of a machine of {machine}, {between:g} GB/s for each GPU between machines; {latency:g} µs a "
        "hop; nothing overlaps.",
        "",
        "## Remembered",
        "",
        "GB of 10⁹ bytes, float32; each process has the rows of its own examples.",
        "",
        f"| method | all | {' | '.join(f'each of {n}' for n in gpus)} |",
        f"|---|---|{'---|' * len(gpus)}",
    ]
    for name, step in costs.items():
        total = sum(step.remembered.values()) / 1e9
        lines.append(f"| {name} | {total:,.2f} | {' | '.join(f'{total / n:,.2f}' for n in gpus)} |")
    lines += [
        "",
        "## Sent in a step",
        "",
        f"Gradients: {sum(sizes):,} bytes in {len(sizes)} buckets of at most 25 MiB. A ring sends 2 (N − 1)/N of them "
        "from each GPU, in 2 (N − 1) hops a bucket:",
        "",
        "    seconds = 2 (N − 1)/N · bytes / bandwidth + buckets · 2 (N − 1) · latency",
        "",
        "| GPUs | sent by each, MB | seconds |",
        "|---|---|---|",
        *(f"| {n} | {2 * (n - 1) / n * sum(sizes) / 1e6:,.0f} | {ring(n):.4f} |" for n in gpus),
        "",
        "Synchronised batch statistics (`ba.distributed.synchronise`), where passes are in train mode: small sums that "
        "wait for each other, so that latency counts and bytes do not. One hop of latency each is the least.",
        "",
        "| method | sums | bytes in them | seconds at the least |",
        "|---|---|---|---|",
    ]
    for name in ("Fast-AT", "Fast-BAT"):
        count, sent = collectives(name)
        lines.append(f"| {name} | {count:,} | {sent:,} | {count * latency * 1e-6:.4f} |")
    lines += [
        "",
        "## Computed",
        "",
        "    seconds of a step = operations an image · images on a GPU / (peak · utilisation) + the gradients' seconds",
        "",
        f"and an epoch is {EXAMPLES:,} / (images on a GPU · GPUs) of them. In brackets the share of a step in which "
        "gradients are sent, and the images that have to be decoded for each GPU.",
        "",
        "| method | GFLOP an image | × standard | images on a GPU | "
        + " | ".join(f"epoch on {n} GPUs, minutes" for n in gpus)
        + " |",
        f"|---|---|---|---|{'---|' * len(gpus)}",
    ]
    for name in ("Fast-AT", "ATAS, kept at 32×32", "Fast-BAT", "Fast-BAT, remembered"):
        for examples in per_gpu:
            cells = []
            for n in gpus:
                step = compute(name, examples) + ring(n)
                minutes = EXAMPLES / (examples * n) * step / 60
                cells.append(f"{minutes:.1f} ({ring(n) / step:.0%}; {examples / step:,.0f} images/s)")
            lines.append(
                f"| {name} | {costs[name].flops / 2e9:.1f} | {costs[name].multiple:.2f} | {examples} | "
                f"{' | '.join(cells)} |"
            )
    fastest = per_gpu[-1] / (compute("Fast-AT", per_gpu[-1]) + ring(gpus[0]))
    lines += [
        "",
        f"One process decoded, cropped and flipped {decoded():,.0f} JPEG images of 500×375 a second (the median "
        "without workers in scaling-workers.json, of [scaling.md](scaling.md); on one core there). At that rate "
        f"{fastest:,.0f} images a second (Fast-AT, {per_gpu[-1]} on each of {gpus[0]}) need {fastest / decoded():.1f} "
        "cores for each GPU that do nothing else; with fewer, decoding is what an epoch takes.",
        "",
        "## Dealt by example",
        "",
        "Where something is remembered by example, example i belongs to process i mod N: processes have unequal parts "
        "of a batch, and all wait for the largest. Its expected size over the mean, which a step takes longer by, of a "
        "multinomial, exactly; drawn without replacement, as in an epoch, it is no larger. Dealt by place in the batch "
        "the largest is ⌈B/N⌉, which is the mean for these.",
        "",
        f"| examples in the batch, B | {' | '.join(f'N = {n}' for n in gpus)} |",
        f"|---|{'---|' * len(gpus)}",
    ]
    for batch in BATCHES:
        cells = [f"{expected_largest(batch, n) * n / batch:.3f}" for n in gpus]
        lines.append(f"| {batch:,} | {' | '.join(cells)} |")
    show(lines, write)


def command(args: Sequence[str]) -> int:
    text = "ImageNet on several GPUs, on paper."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/processes.py", text))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/processes.py"))
