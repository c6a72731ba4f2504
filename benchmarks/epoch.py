"""An epoch of every method, beside an epoch of standard training, in float32 and bfloat16.

    python benchmarks/epoch.py --data cifar10 --data-dir D --write docs/results

Each method trains one epoch with its recipe for the data set, on one network for all (a few steps before it warm the
machine up); evaluation is not timed, and an epoch of Free-AT is its m replays. The record is the ratio to standard
training in the same precision and process; seconds are of the named device. On a CPU, ``--examples 256 --batch-size 64
--methods fastat fastbat`` shows that it works.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pages import at_least_one
from rich.console import Console
from rich.table import Table

from bilevel_at.commands import flags
from bilevel_at.commands.device import resolve_device
from bilevel_at.data import ImageSet, load_data
from bilevel_at.errors import InputError
from bilevel_at.evaluate import Attack
from bilevel_at.models import build_model
from bilevel_at.runs.problem_file import ProblemFile, packaged_problems
from bilevel_at.runs.provenance import device_name
from bilevel_at.train import Trainer

METHODS = tuple(path.stem for path, _ in packaged_problems())
WARM_UP_STEPS = 5


def seconds_of(work: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def epoch_of(
    method: str, precision: str, data: str, train: ImageSet, model_name: str, batch_size: int | None
) -> tuple[float, float]:
    """(seconds of one training epoch, peak memory in GiB on a GPU, else 0)."""
    file = ProblemFile(method)
    recipe = dataclasses.replace(file.recipe(data), epochs=1)
    if batch_size is not None:
        recipe = dataclasses.replace(recipe, batch_size=batch_size)
    device = train.device
    torch.manual_seed(0)
    model = build_model(model_name, train.shape, train.classes, train).to(device)
    problem = file.problem(**recipe.problem)
    solver = file.solver() if file.solver else None
    if solver is None:
        raise InputError(f"{method} has no solver(); this benchmark needs one")

    def trainer(images: ImageSet) -> Trainer:
        return Trainer(problem, solver, model, images, images, recipe, Attack("clean"), precision=precision)

    trainer(train[slice(0, WARM_UP_STEPS * recipe.batch_size)]).train_epoch(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timed = trainer(train)
    seconds = seconds_of(lambda: timed.train_epoch(0), device)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return seconds, memory


def save(
    folder: Path,
    device: str,
    data: str,
    train: ImageSet,
    model: str,
    batch_size: int | None,
    rows: Sequence[dict[str, Any]],
) -> None:
    """Write the record so far, one file for each device, data set and network."""
    record = {
        "command": ["benchmarks/epoch.py", *sys.argv[1:]],
        "date": datetime.date.today().isoformat(),
        "device": device,
        "torch": str(torch.__version__),
        "data": data,
        "examples": len(train),
        "batch_size": batch_size or "the recipes'",
        "model": model,
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"epoch-{device.replace(' ', '-')}-{Path(data).stem}-{model}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")


def benchmark(
    data: str = "cifar10",
    data_dir: str = "data",
    model: str = "preact_resnet18",
    methods: tuple[str, ...] = METHODS,
    precisions: tuple[str, ...] = ("float32", "bfloat16"),
    examples: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    write: str | None = None,
) -> None:
    """Time an epoch of each method.

    Args:
        data: data set, as for bilevel_at.run.
        data_dir: where it lies.
        model: network by name.
        methods: problem files by name; standard is always timed too.
        precisions: float32, bfloat16.
        examples: train on this many only.
        batch_size: instead of the recipes'.
        device: cpu, cuda, or auto.
        write: a folder for epoch-DEVICE-MODEL.json.
    """
    at_least_one(examples=examples, batch_size=batch_size)
    place = resolve_device(device)
    train, _ = load_data(data, data_dir)
    train = (train if examples is None else train.sample(examples)).to(place)
    name = device_name(place)
    rows: list[dict[str, Any]] = []
    console = Console()
    for precision in precisions:
        base = 0.0
        for method in dict.fromkeys(("standard", *methods)):
            with console.status(f"{method}, {precision}"):
                seconds, memory = epoch_of(method, precision, data, train, model, batch_size)
            base = base or seconds
            row = {"method": method, "precision": precision, "seconds": seconds, "ratio": seconds / base, "GiB": memory}
            rows.append(row)
            if write is not None:  # a run that is cut off keeps what it has timed
                save(Path(write), name, data, train, model, batch_size, rows)
            console.print(f"{method:<18} {precision:<9} {seconds:8.2f} s  {seconds / base:5.2f} ×  {memory:6.2f} GiB")
    table = Table(
        "method", "precision", "seconds", "× standard", "GiB", title=f"{model}, {len(train)} examples, {name}"
    )
    for row in rows:
        table.add_row(
            row["method"], row["precision"], f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['GiB']:.2f}"
        )
    console.print(table)


def command(args: Sequence[str]) -> int:
    benchmark(
        **flags.parse(flags.flags_of(benchmark), args, "python benchmarks/epoch.py", "Time an epoch of each method.")
    )
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/epoch.py"))
