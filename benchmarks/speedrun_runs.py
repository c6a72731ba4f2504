"""What ``speedrun.py`` trains and attacks, and the record of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from speedrun_page import CHEAP, PAGE, STRONG, by_composition, mean, page, read

import bilevel_at as ba
from bilevel_at import run as main_job
from bilevel_at.commands.dry_run import training_operations
from bilevel_at.commands.plan import understand
from bilevel_at.data import ImageSet
from bilevel_at.evaluate import attack_from_name
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.evaluations import Store

EPSILON = 8 / 255


@dataclass(frozen=True)
class Entry:
    """A composition with a seed.

    text: what it is.
    job: the main job's command.
    out: its run's directory.
    record: the name of its file of results.
    """

    name: str
    seed: int
    text: str
    job: list[str]
    out: Path
    record: str


def check_folder(entry: Entry) -> None:
    """Raise :class:`InputError` where the run's directory is of another command."""
    run = RunDir(entry.out)
    if run.exists and run.config().get("command", [""])[1:] != entry.job:
        raise ba.InputError(f"{run} holds a run of another command; choose another --folder")


def train(entry: Entry) -> None:
    """The main job, from where it was; counts the processes that have trained."""
    run = RunDir(entry.out)
    started = run.read_json("speedrun.json")["pieces"] if (run.path / "speedrun.json").exists() else 0
    plan = understand(entry.job)
    if len(run.metrics()) < plan.options.epochs:
        run.write_json("speedrun.json", {"pieces": started + 1})
    fresh: Any = nullcontext()
    if plan.options.compile:
        from torch._inductor import config as inductor

        torch._dynamo.reset()
        fresh = inductor.patch(force_disable_caches=True)  # compiling counts, and an earlier process must not help
    with fresh:
        main_job.run([*entry.job, *(["--resume"] if run.exists else [])])


def of_training(entry: Entry) -> dict[str, Any]:
    """What training took, from the run's files."""
    run = RunDir(entry.out)
    config, metrics = run.config(), run.metrics()
    seconds = [m["train_seconds"] for m in metrics]
    usual = len(seconds) * statistics.median_low(seconds)
    try:
        operations: float | None = training_operations(understand(entry.job))
    except (ba.InputError, ba.BilevelError):
        operations = None
    return {
        "versions": config["versions"],
        "precision": config["options"]["precision"],
        "compiled": config["options"]["compile"],
        "memory_format": config["memory_format"]["name"],
        "seconds": sum(seconds),
        "start_seconds": max(0.0, sum(seconds) - usual),
        "epoch_seconds": seconds,
        "operations": operations,
        "pieces": run.read_json("speedrun.json")["pieces"],
        "results": {"clean": run.read_json("results.json")["last"]["clean"]},
    }


def attacked(entry: Entry, attack: str, test: ImageSet) -> dict[str, Any]:
    """The entry of the last epoch's results; goes on where it was cut off."""
    run = RunDir(entry.out)
    model = ba.load(entry.out, "last").to(test.device)
    usual = run.config()["constraint"]["epsilon"]
    store = Store(run, "last", model, test, usual=usual, batch_size=500)
    return store.score(attack_from_name(attack, EPSILON))[1].asdict()


class Speedrun:
    """The entries, and what is on record of each.

    Args:
        target: the folder of the record.
        test: the images that are attacked.
        about: what all records of this command share.
        targets: accuracies in %.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        target: Path,
        test: ImageSet,
        about: dict[str, Any],
        targets: Sequence[float],
    ) -> None:
        self.entries, self.target, self.test, self.about = entries, RunDir(target), test, about
        self.targets = sorted(targets)
        self.console = Console()

    def record(self, entry: Entry) -> dict[str, Any]:
        """The record of this command's training; empty where there is none."""
        there = (self.target.path / entry.record).exists()
        record = self.target.read_json(entry.record) if there else {}
        return record if record.get("job") == entry.job else {}

    def keep(self, entry: Entry, record: dict[str, Any]) -> None:
        self.target.write_json(entry.record, record)
        self.write_page()

    def write_page(self) -> None:
        (self.target.path / PAGE).write_text(page(read(self.target.path), self.targets))

    def train_all(self) -> None:
        """Train each composition, and attack it with the cheap attack."""
        for entry in self.entries:
            record = self.record(entry)
            if not record:
                record = {"composition": entry.name, "text": entry.text, "seed": entry.seed, "job": entry.job}
                record |= self.about
                check_folder(entry)
                try:
                    train(entry)
                    record |= of_training(entry)
                except (ba.BilevelError, ba.InputError, torch.OutOfMemoryError) as error:
                    record["failed"] = str(error)
                self.keep(entry, record)
            self.attack(entry, CHEAP)

    def attack(self, entry: Entry, attack: str) -> None:
        record = self.record(entry)
        if "failed" in record or attack in record["results"]:
            return
        record["results"][attack] = attacked(entry, attack, self.test)
        self.keep(entry, record)
        accuracy = record["results"][attack]["accuracy"]
        line = f"{entry.name}, seed {entry.seed}: {record['seconds']:.1f} s, {attack} {accuracy:.2%}"
        self.console.print(line, highlight=False)

    def seek(self, target: float, margin: float) -> None:
        """AutoAttack on those that may reach the target (%), fastest first, until one does."""
        groups = by_composition([self.record(entry) for entry in self.entries])
        for name, records in sorted(groups, key=lambda group: mean(group[1], "seconds")):
            if 100 * mean(records, CHEAP) < target - margin:
                continue
            mine = [entry for entry in self.entries if entry.name == name]
            for entry in mine:
                self.attack(entry, STRONG)
            if 100 * mean([self.record(entry) for entry in mine], STRONG) >= target:
                return

    def work(self, margin: float) -> None:
        self.train_all()
        for target in self.targets:
            self.seek(target, margin)
        self.write_page()
        self.console.print(f"done: {self.target.path / PAGE}", highlight=False)
