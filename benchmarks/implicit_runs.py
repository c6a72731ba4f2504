"""The runs of ``implicit.py``: Fast-BAT on the digits at a step, a weight and an ε, measured as it trains."""

from __future__ import annotations

import copy
import datetime
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from implicit_measures import (
    Coin,
    Noise,
    Through,
    batch_of,
    decreases,
    least_curvature,
    look,
    segment,
    signal,
    with_start,
)
from lines import read, side_by_side
from torch import nn

import bilevel_at as ba
from bilevel_at.data import Images, load_data
from bilevel_at.evaluate import attack_from_name, robust_correct
from bilevel_at.models import build_model
from bilevel_at.problems import fastbat
from bilevel_at.runs.recipe import DIGITS
from bilevel_at.solvers import HessianFreeKKT, ZeroIG
from bilevel_at.train import Trainer
from bilevel_at.train.finite import NotFinite

LOOKED_AT = 128  # training images
OTHER = 128  # more of them, for steps
CURVED = 16  # of which the Hessian is taken
CHEAP = "nearest-40-3-2"
Term = Literal["implicit", "through", "noise", "coin"]


@dataclass(frozen=True)
class Run:
    """A training run.

    part: of the page that it belongs to.
    seed: of the network, the order of the images and every draw.
    step: 1/λ.
    weight: of the implicit term; 1 is the exact hypergradient.
    term: what is added to the direct term: the implicit term, the derivative through the anchor too, noise of the
        implicit term's norm, or the implicit term with a coin's sign.
    after: the weight-0 run whose network this one goes on with, by its key; "" for a fresh one.
    lengths: whether steps are measured (:func:`implicit_measures.decreases`).
    """

    part: str
    step: float
    weight: float
    seed: int
    epsilon: float = 0.2
    term: Term = "implicit"
    anchor: str = "gradient-step"
    activation: str = "relu"
    lr: float = 0.1
    epochs: int = 30
    after: str = ""
    lengths: bool = False

    @property
    def key(self) -> str:
        parts = [self.part, f"eps{self.epsilon:g}", f"step{self.step:g}", f"w{self.weight:.4g}"]
        usual = {"term": "implicit", "anchor": "gradient-step", "activation": "relu", "lr": 0.1, "epochs": 30}
        parts += [f"{name}{value}" for name, value in asdict(self).items() if usual.get(name, value) != value]
        return "-".join([*parts, f"seed{self.seed}"])

    def problem(self) -> ba.BilevelProblem:
        anchor: Any = self.anchor
        return with_start(fastbat.problem(epsilon=self.epsilon, step=self.step, anchor=anchor))

    def solver(self) -> ba.Solver:
        if self.weight == 0:
            return ZeroIG()
        solvers = {"implicit": HessianFreeKKT, "through": Through, "noise": Noise, "coin": Coin}
        return solvers[self.term](ig_weight=self.weight)

    def attacks(self) -> tuple[str, ...]:
        """The second attack, with all of the term or none at the published step, says whether PGD is deceived."""
        return ("clean", "pgd-50-10", *([CHEAP] if self.step == 20 and self.weight in (0, 1) else []))

    def parts_of(self, count: int) -> set[int]:
        """The epochs that end a part of the training, of ``count`` parts."""
        return {math.ceil(self.epochs * k / count) for k in range(1, count + 1)}


def data(examples: int | None) -> tuple[Images, Images, Images]:
    """Images to train on, those held out, which no figure of the page looks at, and the test images."""
    train, test = load_data("digits", "data", download=False)
    if examples is not None:
        train, test = train.sample(examples), test.sample(examples)
    assert isinstance(train, Images) and isinstance(test, Images)
    images, held_out = train.split(0.1)
    return images, held_out, test


def network_of(run: Run, images: Images, folder: Path) -> nn.Module:
    """A fresh network of this seed, or that of the run before."""
    torch.manual_seed(run.seed)
    activation: Any = run.activation
    model = build_model("small_cnn", images.shape, images.classes, images, activation=activation)
    if run.after:
        model.load_state_dict(torch.load(folder / f"{run.after}.pt", weights_only=True))
    return model


def perform(run: Run, folder: Path, examples: int | None = None) -> dict[str, Any]:
    """Train, measure and attack; the run's line. Its network goes into the folder."""
    torch.set_num_threads(1)
    images, held_out, test = data(examples)
    model, problem = network_of(run, images, folder), run.problem()
    recipe = replace(DIGITS, lr=run.lr, epochs=run.epochs)
    attack = attack_from_name("pgd-20-1", run.epsilon)
    trainer = Trainer(problem, run.solver(), model, images, held_out, recipe, attack, run.seed)
    few = images[slice(0, LOOKED_AT)]
    other = images[slice(LOOKED_AT, LOOKED_AT + OTHER)] if len(images) > LOOKED_AT else few
    name: dict[str, Any] = {"key": run.key, "settings": asdict(run) | {"examples": examples}}
    record: dict[str, Any] = {}
    looks, steps, seconds = [], [], 0.0

    def measure(epoch: int) -> None:
        looks.append({"epoch": epoch, **look(problem, model, few)})
        if run.lengths and epoch in run.parts_of(3):
            rate, size = trainer.optimizer.param_groups[0]["lr"], slice(0, recipe.batch_size)
            steps.append({"epoch": epoch, "lr": rate, **decreases(problem, model, few[size], other)})

    measure(0)
    before = copy.deepcopy(model)
    ratios = []
    for epoch in range(run.epochs):
        start = time.process_time()
        try:
            trained = trainer.train_epoch(epoch)
        except NotFinite as error:  # training that diverges is a result
            return name | {"failed": str(error).splitlines()[0]} | machine()
        seconds += time.process_time() - start
        ratios.append(trained["implicit_ratio"])
        if epoch + 1 in run.parts_of(6):
            measure(epoch + 1)
    torch.save(model.state_dict(), folder / f"{run.key}.pt")
    results = {
        name: {"accuracy": robust_correct(model, test, attack_from_name(name, run.epsilon)).float().mean().item()}
        for name in run.attacks()
    }
    record |= {"results": results, "n": len(test), "looks": looks, "ratios": ratios}
    record["signal"] = signal(problem, model, images, recipe.batch_size)
    record["least_curvature"] = least_curvature(problem, model, few[slice(0, CURVED)])
    with torch.no_grad():
        record["spread"] = model(batch_of(few).x).softmax(1).std(0).mean().item()  # 0 where all images get one answer
    if steps:
        record["steps"] = steps
    if run.after:
        record["segment"] = segment(problem, before, model, few)
    return name | rounded(record | {"seconds": seconds}) | machine()


def machine() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def rounded(value: Any) -> Any:
    """Numbers with five digits, so that a line stays short; None for NaN, which is no JSON."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(of) for name, of in value.items()}
    return [rounded(of) for of in value] if isinstance(value, list) else value


def missing(run: Run, records: Mapping[str, Any], examples: int | None) -> bool:
    """Whether there is no line of the same settings."""
    record = records.get(run.key)
    return record is None or record["settings"] != asdict(run) | {"examples": examples}


def perform_all(runs: Sequence[Run], lines: Path, folder: Path, examples: int | None, jobs: int | None) -> None:
    """Perform those that are missing, in order; those that go on from another wait for those before them.

    Raises:
        BilevelError: after all others are done, where one could not be.
    """
    records = read(lines)
    todo = [run for run in runs if missing(run, records, examples)]
    bases = {run.after for run in todo if run.after and not (folder / f"{run.after}.pt").exists()}
    todo = [run for run in runs if run in todo or run.key in bases]
    folder.mkdir(parents=True, exist_ok=True)
    groups = [
        [(run.key, (run, folder, examples)) for run in group]
        for _, group in groupby(todo, lambda run: (run.seed, bool(run.after)))
    ]
    side_by_side(perform, groups, lines, len(runs), jobs)
