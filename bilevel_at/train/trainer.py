"""Epochs of ``zero_grad``, ``backward``, ``step``; after each, a look at the held-out tenth."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..data import Images, Loader
from ..errors import BilevelError
from ..evaluate import Attack, robust_correct
from ..problem import BilevelProblem
from ..solver import Solver
from .recipe import Recipe

__all__ = ["Epoch", "Trainer", "rank"]


@dataclass(frozen=True)
class Epoch:
    """What one epoch measured, a line of ``metrics.jsonl``.

    loss: the mean upper loss over the epoch. clean, robust: accuracies on the held-out examples, under no attack and
    under ``attack``. implicit_ratio: the norm of the implicit term over that of ∇_θ f, the mean over steps.
    lr: at the epoch's last step.
    """

    epoch: int
    loss: float
    clean: float
    robust: float
    attack: str
    implicit_ratio: float
    lr: float
    seconds: float

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def rank(metrics: Mapping[str, Any]) -> tuple[float, float, int]:
    """The best epoch has the largest of these: robust, then clean accuracy, then the later one."""
    return metrics["robust"], metrics["clean"], metrics["epoch"]


class Trainer:
    """Trains ``model`` on ``problem`` with ``solver``.

        for epoch in trainer.epochs():    # an Epoch, after each epoch
            ...

    Randomness depends on ``(seed, epoch)`` alone, so a run resumed from :meth:`state_dict` gives the same weights as
    an unbroken one.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        solver: Solver,
        model: nn.Module,
        train: Images,
        held_out: Images,
        recipe: Recipe,
        attack: Attack,
        seed: int = 0,
        precision: str = "float32",
    ) -> None:
        self.problem, self.solver, self.model = problem, solver, model
        self.held_out, self.recipe, self.attack, self.seed = held_out, recipe, attack, seed
        self.precision = precision
        self.loader = Loader(train, recipe.batch_size, seed, recipe.augment)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.done = 0

    def epochs(self) -> Iterator[Epoch]:
        """Train the epochs that are left, yielding each one's measurements."""
        while self.done < self.recipe.epochs:
            start = time.perf_counter()
            loss, ratio = self.train_epoch(self.done)
            clean = robust_correct(self.model, self.held_out, Attack("clean", 0.0)).float().mean().item()
            robust = robust_correct(self.model, self.held_out, self.attack, seed=self.done).float().mean().item()
            lr = self.optimizer.param_groups[0]["lr"]
            self.done += 1
            seconds = time.perf_counter() - start
            yield Epoch(self.done, loss, clean, robust, self.attack.name, ratio, lr, seconds)

    def train_epoch(self, epoch: int) -> tuple[float, float]:
        """One pass over the training set as epoch ``epoch`` (from 0): (mean loss, mean implicit ratio)."""
        device = self.held_out.x.device
        torch.manual_seed(1_000_003 * self.seed + epoch)  # dropout and the like
        generator = torch.Generator(device).manual_seed(2_000_003 * self.seed + epoch)
        self.model.train()
        self.problem.set_epoch(epoch, self.recipe.epochs)
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        for i, batch in enumerate(self.loader.epoch(epoch)):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.lr_at(epoch * len(self.loader) + i, len(self.loader))
            self.optimizer.zero_grad()
            with self._autocast(device):
                step = self.solver.backward(self.problem, self.model, batch, generator=generator)
            self.optimizer.step()
            share = len(batch) / len(self.loader.images)
            ratio = step.implicit_norm / step.direct_norm.clamp(min=1e-30)
            totals += share * torch.stack([step.loss.double(), ratio.double()])
        loss, ratio_mean = totals.tolist()
        if not math.isfinite(loss):
            raise BilevelError(f"the loss is {loss} in epoch {epoch + 1}; lower --lr (now {self.recipe.lr:g})")
        return loss, ratio_mean

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, what the problem remembers, and the number of epochs done."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "problem": self.problem.state_dict(),
            "epochs": self.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.problem.load_state_dict(state["problem"])
        self.done = state["epochs"]
