"""The axes of ``scaling.py`` that are sizes of something beside the step: evaluation, projection, memory, data."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nearest import Counted
from PIL import Image
from scaling_measure import Advance, Axis, Line, Run, in_turn, measured
from scaling_steps import method_step
from torch import nn

import bilevel_at as ba
from bilevel_at.data import Loader, load_data
from bilevel_at.data.decoding import names_of
from bilevel_at.data.stream import Streamed
from bilevel_at.evaluate import Attack, attack_from_name
from bilevel_at.evaluate.robust import attacked
from bilevel_at.models import build_model
from bilevel_at.models.residual import small_resnet
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.problem_file import ProblemFile
from bilevel_at.solvers import ZeroIG
from bilevel_at.train import Trainer


def _trained(epochs: int) -> nn.Module:
    """Fast-AT's network on the digits."""
    train, test = load_data("digits")
    file = ProblemFile("fastat")
    recipe = dataclasses.replace(file.recipe("digits"), epochs=epochs)
    model = build_model("small_cnn", train.shape, train.classes)
    for _ in Trainer(file.problem(**recipe.problem), ZeroIG(), model, train, test, recipe, Attack("clean")).epochs():
        pass
    return model.eval()


def restarts(points: Sequence[int], repeats: int, advance: Advance, epochs: int = 8) -> Axis:
    """Random starts of an attack on a network that ``epochs`` of training have made."""
    images = load_data("digits")[1][slice(0, 60)]
    network = Counted(_trained(epochs))
    names = {"clean": "clean", "PGD-10": "pgd-10-{}", "BETA, 10 steps": "beta-10-{}"}
    runs, counts = {}, {name: list[float]() for name in names}
    for number in points:
        for name, attack in names.items():
            runs[name, number] = partial(attacked, network, images, attack_from_name(attack.format(number), 0.2))
            network.passes = 0
            runs[name, number]()
            counts[name].append(network.passes / len(images))
    seconds = in_turn(runs, repeats, advance)
    lines = [Line(name, [seconds[name, number] for number in points], counts[name]) for name in counts]
    return Axis(
        "restarts",
        "Restarts",
        "random starts, R",
        "Evaluation of Fast-AT's network on 60 digits at ε = 0.2, beside that of clean images. A start attacks the "
        "images that those before have not broken.",
        list(points),
        lines,
        "clean",
        "forward passes an image",
    )


def rows(points: Sequence[int], repeats: int, advance: Advance) -> Axis:
    """The rows of a polyhedron."""
    samples, d = 64, 256
    delta, x = torch.randn(samples, d, dtype=torch.float64), torch.rand(samples, d, dtype=torch.float64)
    every = torch.randn(max(points), d, dtype=torch.float64)
    right = (0.05 + 0.3 * torch.rand(len(every), dtype=every.dtype)) * every.norm(dim=1)
    runs = dict[str, list[Run]]()
    for kind, bounds in {"": None, ", input range": (0, 1)}.items():
        sets = [ba.Polyhedron(every[:m], right[:m], bounds) for m in points]
        runs["projection" + kind] = [partial(one.project, delta, x) for one in sets]
        runs["active set" + kind] = [partial(one.active, one.project(delta, x), x) for one in sets]
    return Axis(
        "rows",
        "Rows of a polyhedron",
        "rows, m",
        f"`Polyhedron` on {samples} normal draws of {d} values, float64: the projection, and the active set that KKT "
        "solvers ask for, without an input range and with one.",
        list(points),
        measured(runs, repeats, advance, count=False),
    )


def remembered(points: Sequence[int], repeats: int, advance: Advance) -> Axis:
    """Examples of which a perturbation is remembered."""
    shape, size = (3, 32, 32), 128
    model = small_resnet(shape, 10).train()
    x, y = torch.rand(size, *shape), torch.arange(size) % 10
    with tempfile.TemporaryDirectory() as folder:
        runs, sizes = {}, []
        for n in points:
            problem = ProblemFile("atta").problem()
            memory = problem.lower.anchor.memory
            whole = ba.Batch(torch.empty(n, 0), index=torch.arange(n), examples=n)
            memory.write(whole, torch.zeros(n, *shape).uniform_(-8 / 255, 8 / 255))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
            run = RunDir(Path(folder) / str(n))

            def step(problem: ba.BilevelProblem = problem, n: int = n, optimizer: Any = optimizer) -> None:
                optimizer.zero_grad()
                batch = ba.Batch(x, y, torch.randint(n, (size,)), examples=n)
                ZeroIG().backward(problem, model, batch)
                optimizer.step()

            def write(problem: ba.BilevelProblem = problem, run: RunDir = run, optimizer: Any = optimizer) -> None:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                run.save_checkpoint("last", {**state, "problem": problem.state_dict()})

            def read(run: RunDir = run) -> None:
                ProblemFile("atta").problem().load_state_dict(run.checkpoint("last")["problem"])

            runs["standard", n] = method_step("standard", model, ba.Batch(x, y))
            runs["ATTA", n], runs["checkpoint written", n], runs["checkpoint read", n] = step, write, read
            step(), write()
            files = [run.path / "last.pt", *run.path.glob("memory-*.pt")]  # of the one checkpoint so far
            sizes.append([sum(file.stat().st_size for file in files) / 1e6])
        seconds = in_turn(runs, repeats, advance)
    names = dict.fromkeys(name for name, _ in runs)
    lines = [Line(name, [seconds[name, n] for n in points]) for name in names]
    return Axis(
        "remembered",
        "Examples remembered",
        "examples remembered, N",
        f"`small_resnet` on batches of {size} images of 3×32×32 without augmentation (with crops of 4 pixels a row is "
        "1.56 times as long): a step of ATTA, and the checkpoint that a run writes after every epoch, beside a step of "
        "standard training. One megabyte is 10⁶ bytes.",
        list(points),
        [*lines, Line("size of the checkpoint", sizes, unit="MB")],
        "standard",
    )


def workers(points: Sequence[int], repeats: int, advance: Advance, images: int = 640) -> Axis:
    """Processes that decode streamed images."""
    smooth = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{i}.jpg") for i in range(images)]
        for path in paths:
            noise = Image.fromarray(smooth.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            noise.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        names = names_of(Path(folder), paths)
        y = torch.zeros(images, dtype=torch.int64)
        sets = {n: Streamed(Path(folder), names, y, 10, n) for n in points}
        loaders = {n: Loader(one, 32, augment="resized-crop-flip") for n, one in sets.items()}

        def epoch(loader: Loader) -> None:
            for _ in loader.epoch(0):
                pass

        # More processes than cores is a point of the axis, not a mistake.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        seconds = in_turn(
            {n: partial(epoch, loader) for n, loader in loaders.items()}, repeats, advance, time.perf_counter
        )
    rates = [[images / value for value in seconds[n]] for n in points]
    return Axis(
        "workers",
        "Workers of the streamed loader",
        "worker processes",
        f"An epoch of {images} JPEG files of 500×375 in batches of 32, decoded, cropped and flipped to 224×224, with "
        "the start of the processes; 0 decodes in this one. Wall time, since the work is in other processes; there are "
        f"{_cores()} cores to use.",
        list(points),
        [Line("images a second", rates, unit="images/s")],
        clock="wall",
        powers=False,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
