"""The calibration of ``speedrun_cpu.py``: processor seconds of a training step of each composition."""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bilevel_at.commands.plan import understand
from bilevel_at.commands.prepare import network_for
from bilevel_at.data import ImageSet
from bilevel_at.evaluate import Attack
from bilevel_at.runs.provenance import device_name, today
from bilevel_at.train import Trainer

__all__ = ["CALIBRATION", "calibrate", "measure", "read", "seconds_of"]

CALIBRATION = "speedrun.calibration.json"
STEPS, REPEATS = 8, 7
Rows = dict[str, dict[str, Any]]


def read(path: Path) -> Rows:
    """The rows on record, by composition; none where there is no file."""
    rows: Rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return rows


def seconds_of(row: Mapping[str, Any]) -> float:
    """The median over repeats."""
    return statistics.median(row["seconds"])


def trainer_of(job: Sequence[str], train: ImageSet, epochs: int) -> Trainer:
    """What a run of the main job trains with, on these images."""
    plan = understand([*job, "--epochs", str(epochs)])
    options = plan.options
    return Trainer(
        plan.problem,
        plan.solver,
        network_for(plan, train),
        train,
        train,
        options.training(),
        Attack("clean"),
        precision=options.precision,
        memory_format=options.memory_format,
    )


def measure(jobs: Mapping[str, Sequence[str]], train: ImageSet) -> dict[str, list[float]]:
    """Processor seconds of a step in each repeat, on one thread.

    Each repeat takes a few steps of each composition in turn, so that whatever else the machine does meanwhile, it does
    to all of them. The repeat before the first warms up.

    Args:
        jobs: commands of the main job, by composition.
        train: images, of which the first few batches are taken.
    """
    torch.set_num_threads(1)
    batch = understand([*next(iter(jobs.values()))]).options.batch_size
    few = train.sample(min(len(train), STEPS * batch))
    trainers = {name: trainer_of(job, few, REPEATS + 1) for name, job in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(REPEATS + 1):
        for name, trainer in trainers.items():
            start = time.process_time()
            trainer.train_batches(repeat)
            if repeat:
                seconds[name].append((time.process_time() - start) / trainer.steps_per_epoch)
    return seconds


def calibrate(jobs: Mapping[str, Sequence[str]], train: ImageSet, path: Path) -> Rows:
    """The rows of these compositions, from the file where they are in it.

    Those that are missing are measured in one run, and written. Where the file has rows already, its first one is
    measured again beside them, and the new ones are scaled by what it took then and takes now.
    """
    rows = read(path)
    missing = {name: list(job) for name, job in jobs.items() if rows.get(name, {}).get("job") != shlex.join(job)}
    if not missing:
        return rows
    known = {name: row for name, row in rows.items() if name not in missing}
    first = next(iter(known), None)
    beside = {} if first is None else {first: shlex.split(known[first]["job"])}
    measured = measure({**beside, **missing}, train)
    scale = 1.0 if first is None else seconds_of(known[first]) / statistics.median(measured[first])
    about = {"date": today(), "device": device_name(torch.device("cpu")), "torch": str(torch.__version__)}
    rows = known | {
        name: {
            "job": shlex.join(job),
            "seconds": [float(f"{scale * s:.4g}") for s in measured[name]],
            "beside": first,
            **about,
        }
        for name, job in missing.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return rows
