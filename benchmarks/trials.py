"""Runs of the main job side by side, each attacked when it is trained; one line of JSON for each that is done.

What has a line is not repeated; a run that was cut off goes on from its last checkpoint, and an attack from its last
batches. ``parts.py`` and ``speedrun_cpu.py`` use it.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lines import Record, read, side_by_side

import bilevel_at as ba
from bilevel_at import run as main_job
from bilevel_at.commands.dry_run import training_operations
from bilevel_at.commands.plan import understand
from bilevel_at.data import load_data
from bilevel_at.errors import BilevelError, InputError
from bilevel_at.evaluate import attack_from_name
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.evaluations import Store
from bilevel_at.train import Trainer

ROWS = 500  # examples that are attacked at a time
BY_EPOCH = ("train", "clean", "robust", "alignment", "implicit_ratio", "implicit_cosine", "perturbation")
PLACES = ("--data-dir", "--out")
PROCESSOR = "processor-seconds.txt"


@dataclass(frozen=True)
class Trial:
    """A command of the main job, and what its last epoch is attacked with.

    key: its line's key, and the name of its folder.
    job: the command, without --out.
    attacks: the number of test images, the first so many, by attack; 0 for all.
    about: more for its line.
    """

    key: str
    job: tuple[str, ...]
    attacks: Mapping[str, int]
    about: Mapping[str, Any] = field(default_factory=dict)


def settings_of(job: Sequence[str]) -> list[str]:
    """The command without where files are."""
    without = {i + k for i, word in enumerate(job) for k in (0, 1) if word in PLACES}
    return [word for i, word in enumerate(job) if i not in without]


def missing(trial: Trial, records: Mapping[str, Record]) -> bool:
    """Whether the trial has no line of the same command with all its attacks."""
    record = records.get(trial.key)
    if record is None or record["job"] != settings_of(trial.job):
        return True
    return "failed" not in record and any(
        name not in record["results"] or (n and record["results"][name]["n"] < n) for name, n in trial.attacks.items()
    )


def perform(trial: Trial, folder: Path) -> Record:
    """Train and attack, from where it was; the line. Prints nothing."""
    torch.set_num_threads(1)
    out = folder / trial.key
    command = [*trial.job, "--attacks", "clean", "--out", str(out)]
    record: Record = {"key": trial.key, **trial.about, "job": settings_of(trial.job)}
    run = RunDir(out)
    if run.exists and settings_of(run.config()["command"][1:]) != settings_of(command):
        raise InputError(f"{out} is a run of another command; choose another --folder, or delete it")
    with contextlib.redirect_stdout(io.StringIO()):
        plan = understand(command)
        try:
            if not (out / "results.json").exists():
                with processor_seconds(out / PROCESSOR):
                    main_job.run([*command, *(["--resume"] if run.exists else [])])
        except BilevelError as error:  # training that diverges is a result
            return record | {"failed": str(error).splitlines()[0]}
        record["results"] = attack(trial, run, plan.options.data, plan.options.data_dir)
    config, metrics = run.config(), run.metrics()
    return record | {
        "date": config["date"],
        "device": config["machine"]["device"],
        "versions": {name: config["versions"][name] for name in ("python", "torch")},
        "operations": training_operations(plan),
        "seconds": round(sum(m["train_seconds"] for m in metrics), 1),
        "processor_seconds": _processor_seconds(out / PROCESSOR, len(metrics)),
        "epochs": {name: [_rounded(m.get(name)) for m in metrics] for name in BY_EPOCH},
    }


@contextlib.contextmanager
def processor_seconds(path: Path) -> Iterator[None]:
    """Meanwhile each epoch of training leaves its number and this process's processor seconds in a line of the file.

    What others do on the machine changes these less than those of the clock. An epoch that was stopped has several
    lines.
    """
    train_epoch = Trainer.train_epoch

    def timed(self: Trainer, epoch: int) -> dict[str, Any]:
        start = time.process_time()
        try:
            return train_epoch(self, epoch)
        finally:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{epoch} {time.process_time() - start:.3f}\n")

    Trainer.train_epoch = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.train_epoch = train_epoch  # type: ignore[method-assign]


def _processor_seconds(path: Path, epochs: int) -> float | None:
    """Of all epochs; None where one is missing, as in runs from before these were noted."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if {int(epoch) for epoch, _ in lines} != set(range(epochs)):
        return None
    return round(sum(float(seconds) for _, seconds in lines), 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def attack(trial: Trial, run: RunDir, data: str, data_dir: str) -> dict[str, dict[str, float]]:
    """Accuracy of the last epoch under each attack, and on how many images."""
    _, test = load_data(data, data_dir, download=False)
    model, threat = ba.load(run.path, "last"), run.config()["constraint"]["epsilon"]
    results = {}
    for name, n in trial.attacks.items():
        store = Store(run, "last", model, test[slice(0, n or len(test))], usual=threat, batch_size=ROWS)
        score = store.score(attack_from_name(name, threat))[1]
        results[name] = {"accuracy": round(score.accuracy, 6), "n": score.n}
    return results


def perform_all(trials: Sequence[Trial], lines: Path, folder: Path, jobs: int | None = None) -> dict[str, Record]:
    """Perform those that are missing, in order; the lines by key.

    Args:
        trials: what is to be there at the end.
        lines: the file of lines, rewritten after each.
        folder: where the runs go.
        jobs: side by side, one thread each; one for each core if not given.

    Raises:
        InputError: for a command that is mistaken, before anything is trained.
        BilevelError: after all others are done, where one could not be.
    """
    records = read(lines)
    todo = [trial for trial in trials if missing(trial, records)]
    for trial in todo:
        understand([*trial.job, "--attacks", "clean", "--out", str(folder / trial.key)])
    side_by_side(perform, [[(trial.key, (trial, folder)) for trial in todo]], lines, len(trials), jobs)
    return read(lines)
