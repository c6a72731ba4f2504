"""The runs of ``overfitting.py``: a composition, an ε and a seed; after each epoch, what could warn of a collapse."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bilevel_at as ba
from bilevel_at.data import Images, load_data
from bilevel_at.evaluate import attack_from_name
from bilevel_at.models.residual import small_resnet
from bilevel_at.modes import Mode
from bilevel_at.problems import composed, fastbat
from bilevel_at.solvers import HessianFreeKKT, PlainName
from bilevel_at.train import Recipe, Trainer
from bilevel_at.train.finite import NotFinite

BATCH, RATE, WIDTH = 64, 0.1, 16  # width 16: 77,000 parameters
LOOKED_AT = 256  # held-out images, for gradients
ROWS = 500  # held-out images that are attacked at a time


@dataclass(frozen=True)
class Composition:
    """One of ``problems/composed.py``.

    title: on the page.
    color, dash, marker: in the figure.
    flags: arguments of its problem, but for those below.
    step: of sign steps, in ε; the problem's own if None.
    solver: by name, with Fast-BAT's weight of the implicit term.
    """

    title: str
    color: str
    dash: str
    marker: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    step: float | None = None
    solver: PlainName = "zero-ig"

    def problem(self, epsilon: float, mode: Mode) -> ba.BilevelProblem:
        step = None if self.step is None else self.step * epsilon
        return composed.problem(epsilon, step=step, mode=mode, **self.flags)

    @property
    def words(self) -> str:
        """The flags as on a command line."""
        flags = dict(self.flags) | ({} if self.step is None else {"step": f"{self.step:g}ε"})
        flags |= {} if self.solver == "zero-ig" else {"solver": self.solver}
        words = (
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in flags.items()
        )
        return " ".join(words)


TWO_STEPS = {"anchor": "gradient-step", "direction": "taylor"}
COMPOSITIONS = {
    "fgsm": Composition("FGSM from 0", "#d9730d", "-", "o", {"anchor": "zero"}),
    "fastat": Composition("Fast-AT, uniform start", "#a05195", "--", "v", {"anchor": "uniform"}, step=1.25),
    "nfgsm": Composition("from noise (N-FGSM)", "#f2b134", "-", "P", {"anchor": "noise"}),
    "atta": Composition("remembered (ATTA)", "#5aa2d6", "--", "<", {"anchor": "remembered"}, step=0.5),
    "atas": Composition("ATAS", "#2f4b7c", ":", "D", {"anchor": "remembered", "adaptive": True}),
    "gradalign": Composition("GradAlign", "#1f5fa8", "-", "s", {"anchor": "zero", "upper": "gradalign"}),
    "unsigned": Composition("two unsigned steps", "#8a8a8a", "--", ">", TWO_STEPS),
    "fastbat": Composition("Fast-BAT", "#111111", "-.", "^", TWO_STEPS, solver="hessian-free-kkt"),
    "fgsm-qub": Composition("FGSM from 0, QUB", "#7a3b10", "-.", "X", {"anchor": "zero", "upper": "qub"}),
}


@dataclass(frozen=True)
class Run:
    """A training run.

    method: of the compositions.
    epsilon: in 255ths.
    seed: of the network, the order of the images and every draw.
    epochs, examples: passes over the training images, and how many images there are, a tenth of them held out.
    """

    method: str
    epsilon: float
    seed: int
    epochs: int = 15
    examples: int = 10_000

    @property
    def key(self) -> str:
        return f"{self.method}-eps{self.epsilon:g}-seed{self.seed}"

    @property
    def radius(self) -> float:
        return self.epsilon / 255

    @property
    def settings(self) -> dict[str, Any]:
        """What makes a line another one."""
        composition = COMPOSITIONS[self.method]
        recipe = {"batch_size": BATCH, "lr": RATE, "width": WIDTH, "mode": "train"}
        return asdict(self) | {"flags": composition.words} | recipe


def data(run: Run, data_dir: str) -> tuple[Images, Images]:
    """Images to train on, and those held out: the same for every seed."""
    every, _ = load_data("cifar10", data_dir, download=False)
    images, held_out = every.sample(run.examples).split(0.1)
    return images, held_out


def batch_of(images: Images, rows: slice) -> ba.Batch:
    few = images[rows]
    index = torch.arange(len(few))  # what an attacker remembers by example
    return ba.Batch(few.pixels(), few.y, index)


def trainer_of(run: Run, data_dir: str) -> Trainer:
    composition = COMPOSITIONS[run.method]
    images, held_out = data(run, data_dir)
    torch.manual_seed(run.seed)
    model = small_resnet(images.shape, images.classes, width=WIDTH)
    recipe = Recipe(epochs=run.epochs, batch_size=BATCH, lr=RATE)
    solver = composed.solver(composition.solver, run.radius)
    attack = attack_from_name("pgd-10-1", run.radius)
    return Trainer(composition.problem(run.radius, "train"), solver, model, images, held_out, recipe, attack, run.seed)


def look(run: Run, model: nn.Module, held_out: Images, epoch: int) -> dict[str, float]:
    """What could warn, on held-out images in eval mode, with the same draws after every epoch.

    Under training's attack, which remembers nothing of these images and so begins at a fresh start: accuracy on all of
    them, and the mean norm of its gradient at z on the first 256. Under Fast-BAT's attack on those 256, whatever the
    network was trained with: free coordinates of δ*, and the exact implicit term (weight 1) beside ∇_θ f.
    """
    attacker = COMPOSITIONS[run.method].problem(run.radius, "eval")
    attacker.set_epoch(epoch, run.epochs)
    problem, exact = fastbat.problem(run.radius, mode="eval"), HessianFreeKKT()
    few = slice(0, LOOKED_AT)
    right = 0.0
    with ba.attack_mode(model, "eval"):
        norms = attacker.lower.solve(model, batch_of(held_out, few), generator=generator()).attack_gradient
        for start in range(0, len(held_out), ROWS):
            batch = batch_of(held_out, slice(start, start + ROWS))
            delta = attacker.lower.solve(model, batch, generator=generator(1 + start)).delta
            with torch.no_grad():
                right += (model(batch.x + delta).argmax(1) == batch.y).sum().item()
        step = exact.hypergradient(problem, model, batch_of(held_out, few), generator=generator())
        free = exact.active(problem.lower, model, step.solution).fraction_free()
    return {
        "attacked": right / len(held_out),
        "gradient": 0.0 if norms is None else norms.flatten(1).norm(dim=1).mean().item(),
        "free": free,
        "share": (step.implicit_norm / step.direct_norm).item(),
        "cosine": step.implicit_cosine.item(),
    }


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TAKEN = ("epoch", "loss", "train", "clean", "robust", "alignment", "perturbation", "train_seconds", "seconds")
"""Of what Trainer says of an epoch."""


def perform(run: Run, data_dir: str, folder: Path) -> dict[str, Any]:
    """Train from where it was cut off, and look after each epoch; the run's line."""
    torch.set_num_threads(1)
    trainer, unfinished = trainer_of(run, data_dir), folder / f"{run.key}.pt"
    record: dict[str, Any] = {"key": run.key, "settings": run.settings}
    lines: list[dict[str, Any]] = []
    if unfinished.exists():
        saved = torch.load(unfinished, weights_only=True)
        if saved["settings"] == run.settings:
            trainer.load_state_dict(saved["state"])
            lines = saved["lines"]
    try:
        for epoch in trainer.epochs():
            taken = {name: getattr(epoch, name) for name in (*TAKEN, "attack")}
            lines.append(taken | look(run, trainer.model, trainer.held_out, epoch.epoch - 1))
            part = unfinished.with_suffix(".part")
            torch.save({"settings": run.settings, "state": trainer.state_dict(), "lines": lines}, part)
            part.replace(unfinished)
    except NotFinite as error:  # training that diverges is a result
        record["failed"] = str(error).splitlines()[0]
    unfinished.unlink(missing_ok=True)
    return record | {"epochs": rounded(lines)} | machine()


def machine() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def rounded(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Numbers with five digits, so that a line stays short."""
    return [{name: _rounded(value) for name, value in line.items()} for line in lines]


def _rounded(value: Any) -> Any:
    """None where it is not finite, which JSON has no word for."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None
