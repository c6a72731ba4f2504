"""An epoch of every method, beside an epoch of standard training: in float32 and bfloat16, compiled, in both formats.

    python benchmarks/epoch.py --data cifar10 --data-dir D --write docs/results --minutes 9

Each method trains one epoch with its recipe for the data set, on one network for all. A few steps of two epochs come
before, with the last batch's size among them: they warm the machine up and compile what is compiled, and their seconds
are reported apart. Evaluation is not timed, and an epoch of Free-AT is its m replays. The record is the ratio to
standard training in the same precision, memory format and process; seconds are of the named device.

Rows that are in the file of results already are not timed again, so that the same command goes on where it was stopped;
the exit status is 3 as long as there is more to do. Standard training is timed in each process that times anything. On
a CPU, ``--examples 256 --batch-size 64 --methods fastat fastbat`` shows that it works.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pages import at_least_one
from pieces import in_pieces
from rich.console import Console
from rich.table import Table
from torch._inductor import config as inductor

import bilevel_at as ba
from bilevel_at.commands import flags
from bilevel_at.commands.device import resolve_device
from bilevel_at.data import ImageSet, Loader, load_data
from bilevel_at.evaluate import Attack
from bilevel_at.models import build_model
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.problem_file import ProblemFile, packaged_problems
from bilevel_at.runs.provenance import device_name
from bilevel_at.solvers import ZeroIG
from bilevel_at.train import Trainer
from bilevel_at.train.memory_format import MemoryFormat

METHODS = tuple(path.stem for path, _ in packaged_problems())
VARIANTS = ("float32", "bfloat16", "float32-compiled", "bfloat16-compiled")
WARM_UP_STEPS = 5
KEY = ("method", "variant", "memory_format", "examples", "batch_size", "torch")
Row = dict[str, Any]


class Few:
    """A loader of an epoch's first batches, and of those of another size, which need a graph of their own."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[ba.Batch]:
        for number, batch in enumerate(self.loader.epoch(epoch, start), start):
            if number < WARM_UP_STEPS or len(batch) != self.loader.batch_size:
                yield batch


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def graphs() -> int:
    """How many graphs torch has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def epoch_of(
    method: str,
    variant: str,
    memory_format: MemoryFormat,
    data: str,
    train: ImageSet,
    model_name: str,
    batch_size: int | None,
) -> Row:
    """Seconds of one training epoch and of what came before it, the epoch's peak memory on a GPU, graphs it compiled.

    Raises:
        InputError: where there is no such variant of the method.
    """
    precision, _, compiled = variant.partition("-")
    file = ProblemFile(method)
    recipe = dataclasses.replace(file.recipe(data), epochs=3, epsilon_warmup=0)
    if batch_size is not None:
        recipe = dataclasses.replace(recipe, batch_size=batch_size)
    device = train.device
    torch.manual_seed(0)
    model = build_model(model_name, train.shape, train.classes, train).to(device)
    solver = ZeroIG() if file.solver is None else file.solver()
    if compiled:
        torch._dynamo.reset()
        solver.compile()
    trainer = Trainer(
        file.problem(**recipe.problem),
        solver,
        model,
        train,
        train,
        recipe,
        Attack("clean"),
        precision=precision,
        memory_format=memory_format,
    )
    whole = trainer.loader
    trainer.loader = Few(whole)  # type: ignore[assignment]  # all that training asks of a loader
    with inductor.patch(force_disable_caches=True):  # a graph of an earlier process would shorten the warm-up
        warm_up = seconds_of(lambda: [trainer.train_batches(epoch) for epoch in range(2)], device)
        trainer.loader = whole
        before = graphs()
        seconds = seconds_of(lambda: trainer.train_epoch(2), device)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"seconds": seconds, "warm_up_seconds": warm_up, "graphs": graphs() - before, "GiB": memory}


class Record:
    """The rows on record, in one file for each device, data set and network; only in memory without a folder.

    A row says which settings it was timed with, so that rows of other settings stay beside it.
    """

    def __init__(self, folder: str | None, device: str, data: str, model: str) -> None:
        self.name = f"epoch-{device.replace(' ', '-')}-{Path(data).stem}-{model}.json"
        self.folder = None if folder is None else RunDir(folder)
        self.about = {"device": device, "data": data, "model": model}
        there = self.folder is not None and (self.folder.path / self.name).exists()
        self.rows: list[Row] = self.folder.read_json(self.name)["rows"] if self.folder and there else []

    def find(self, row: Row) -> Row | None:
        """The row on record with the settings of this one."""
        return next((r for r in self.rows if all(r.get(name) == row[name] for name in KEY)), None)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.folder is not None:
            command = ["benchmarks/epoch.py", *sys.argv[1:]]
            self.folder.write_json(self.name, {"command": command, **self.about, "rows": self.rows})


def line_of(row: Row) -> str:
    name = f"{row['method']:<18} {row['variant']:<17} {row['memory_format']:<13}"
    if "refused" in row:
        return f"{name} skipped: {row['refused']}"
    return (
        f"{name} {row['seconds']:8.2f} s  {row['ratio']:5.2f} ×  {row['GiB']:6.2f} GiB  "
        f"after {row['warm_up_seconds']:.1f} s of warm-up"
    )


def benchmark(
    data: str = "cifar10",
    data_dir: str = "data",
    model: str = "preact_resnet18",
    methods: tuple[str, ...] = METHODS,
    variants: tuple[Literal["float32", "bfloat16", "float32-compiled", "bfloat16-compiled"], ...] = (
        "float32",
        "bfloat16",
        "bfloat16-compiled",
    ),
    memory_formats: tuple[MemoryFormat, ...] = ("contiguous", "channels_last"),
    examples: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    minutes: float | None = None,
    write: str | None = None,
) -> int:
    """Time an epoch of each method.

    Args:
        data: data set, as for bilevel_at.run.
        data_dir: where it lies.
        model: network by name.
        methods: problem files by name; standard is always timed too.
        variants: float32, bfloat16, float32-compiled, bfloat16-compiled.
        memory_formats: of the network's weights: contiguous, channels_last.
        examples: train on this many only.
        batch_size: instead of the recipes'.
        device: cpu, cuda, or auto.
        minutes: stop after so many, to go on with the same command; needs --write.
        write: a folder for epoch-DEVICE-DATA-MODEL.json.
    """
    at_least_one(examples=examples, batch_size=batch_size)
    if minutes is not None and write is None:
        raise ba.InputError("--minutes needs --write FOLDER, where the next piece finds what has been timed")
    for method in methods:
        ProblemFile(method)  # which says whether there is one
    place = resolve_device(device)
    train, _ = load_data(data, data_dir)
    train = (train if examples is None else train.sample(examples)).to(place)
    record = Record(write, device_name(place), data, model)
    given = {"examples": len(train), "batch_size": batch_size or "the recipes'", "torch": str(torch.__version__)}
    console = Console()

    def settings(method: str, variant: str, memory_format: MemoryFormat) -> Row:
        return {"method": method, "variant": variant, "memory_format": memory_format, **given}

    def timed(row: Row) -> Row:
        with console.status(f"{row['method']}, {row['variant']}, {row['memory_format']}"):
            where = data, train, model, batch_size
            return epoch_of(row["method"], row["variant"], row["memory_format"], *where)

    def group(variant: str, memory_format: MemoryFormat) -> None:
        """The methods that are missing, beside standard training."""
        every = [settings(m, variant, memory_format) for m in dict.fromkeys(("standard", *methods))]
        missing = [row for row in every if record.find(row) is None]
        if not missing:
            return
        base = timed(every[0])
        for row in missing:
            row["date"] = datetime.date.today().isoformat()
            try:
                measured = base if row["method"] == "standard" else timed(row)
            except (ba.InputError, ba.BilevelError, torch.OutOfMemoryError) as error:
                row["refused"] = str(error)
            else:
                ratio = measured["seconds"] / base["seconds"]
                row |= {**measured, "standard_seconds": base["seconds"], "ratio": ratio}
            record.add(row)  # a run that is cut off keeps what it has timed
            console.print(line_of(row), highlight=False, markup=False, soft_wrap=True)

    def work() -> None:
        for variant in dict.fromkeys(variants):
            for memory_format in dict.fromkeys(memory_formats):
                group(variant, memory_format)

    status = in_pieces(work, minutes)
    current = [row for row in record.rows if all(row.get(name) == given[name] for name in given)]
    console.print(table(current, f"{model}, {len(train)} examples, {device_name(place)}"))
    return status


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows that were timed."""
    made = Table("method", "variant", "memory format", "seconds", "× standard", "warm-up", "GiB", title=title)
    for row in rows:
        name = (row["method"], row["variant"], row["memory_format"])
        if "refused" in row:
            made.add_row(*name, "refused", "", "", "")
            continue
        numbers = [f"{row[key]:.2f}" for key in ("seconds", "ratio", "warm_up_seconds", "GiB")]
        compiled = f" ({row['graphs']} graphs compiled within)" if row["graphs"] else ""
        made.add_row(*name, numbers[0] + compiled, *numbers[1:])
    return made


def command(args: Sequence[str]) -> int:
    return benchmark(
        **flags.parse(flags.flags_of(benchmark), args, "python benchmarks/epoch.py", "Time an epoch of each method.")
    )


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/epoch.py"))
