"""Epochs of ``zero_grad``, ``backward``, ``step``; after each, a look at the held-out tenth."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import policy
from ..batch import Batch
from ..data import Images, ImageSet, Loader
from ..diagnose import gradient_alignment
from ..draws import generator_on
from ..errors import BilevelError, InputError
from ..evaluate import Attack, robust_correct
from ..modes import attack_mode, autocast
from ..problem import BilevelProblem
from ..runs.metrics import Epoch
from ..runs.recipe import Recipe
from ..solution import Hypergradient, Solution
from ..solver import Solver
from .averages import WeightAverage
from .memory_format import FORMATS, MemoryFormat
from .recorder import Recorder
from .schedules import momentum_at, rate_at
from .watch import Watch

__all__ = ["Trainer"]

ALIGNED = 256  # held-out examples whose input gradients are compared
LOOK_EVERY = 16  # batches; a forward pass on one in 16 costs a fiftieth of a standard step


class Trainer:
    """Trains ``model`` on ``problem`` with ``solver``.

        for epoch in trainer.epochs():    # an Epoch, after each epoch
            ...

    Randomness depends on ``(seed, epoch)`` alone, so a run resumed from :meth:`state_dict` gives the same weights as
    an unbroken one. precision: "float32", or "bfloat16" for autocast; parameters, perturbations and what is remembered
    are float32 either way. extra: more training images, of which the recipe's ``extra_fraction`` of each batch is
    drawn. memory_format: of the network's weights, in place; None leaves them as they are.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        solver: Solver,
        model: nn.Module,
        train: ImageSet,
        held_out: ImageSet,
        recipe: Recipe,
        attack: Attack,
        seed: int = 0,
        precision: str = "float32",
        extra: Images | None = None,
        memory_format: MemoryFormat | None = None,
    ) -> None:
        if precision not in ("float32", "bfloat16"):
            raise InputError(f"precision {precision!r} is not known; choose float32 or bfloat16")
        self.problem, self.solver, self.model = problem, solver, model
        self.held_out, self.recipe, self.attack, self.seed = held_out, recipe, attack, seed
        self.precision, self.device = precision, held_out.device
        if memory_format is not None:
            model.to(memory_format=FORMATS[memory_format])
        self.loader = Loader(
            train, recipe.batch_size, seed, recipe.augment, extra=extra, extra_fraction=recipe.extra_fraction
        )
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.recorder = Recorder(self.loader.labels, model)
        self.average = WeightAverage(model, recipe) if recipe.averages else None
        self.done = 0

    @property
    def steps_per_epoch(self) -> int:
        """Updates of θ."""
        return math.ceil(len(self.loader) / self.recipe.accumulate) * self.recipe.replays

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept: the averaged one where the recipe averages."""
        return self.model if self.average is None or not self.average.started else self.average.network

    def epochs(self) -> Iterator[Epoch]:
        """Train the epochs that are left, yielding each one's measurements."""
        while self.done < self.recipe.epochs:
            start = time.perf_counter()
            measured = self.train_epoch(self.done)
            clean = robust_correct(self.evaluated, self.held_out, Attack("clean")).float().mean().item()
            robust = robust_correct(self.evaluated, self.held_out, self.attack, seed=self.done).float().mean().item()
            lr = self.optimizer.param_groups[0]["lr"]
            self.done += 1
            yield Epoch(
                epoch=self.done,
                clean=clean,
                robust=robust,
                attack=self.attack.name,
                alignment=self._alignment(),
                lr=lr,
                seconds=time.perf_counter() - start,
                **measured,
            )

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training set as epoch ``epoch`` (from 0).

        What it measured, by the names of :class:`Epoch`. Raises :class:`BilevelError` where the loss is not finite.
        """
        start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        means, looks = self.train_batches(epoch)
        if self.average is not None:
            self.average.after_epoch(self.model, epoch + 1, (batch.x for batch in self.loader.epoch(epoch)))
        self.recorder.close_epoch(self.evaluated)
        loss, ratio_mean, cosine_mean = (means / (len(self.loader.images) * self.recipe.replays)).tolist()
        self._check(loss, epoch)
        right, size, rows = looks.tolist()
        return {
            "loss": loss,
            "implicit_ratio": ratio_mean,
            "implicit_cosine": cosine_mean,
            "train": right / rows,
            "perturbation": size / rows,
            "train_seconds": time.perf_counter() - start,
            "memory": torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0,
        }

    def train_batches(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The updates of epoch ``epoch`` (from 0), without a wait for the device; :meth:`train_epoch` without its end.

        Returns, on the device, the sums over examples of (loss, share of the implicit term, its cosine), and those of
        :meth:`_look`. Raises :class:`BilevelError` soon after a loss that is not finite.
        """
        torch.manual_seed(1_000_003 * self.seed + epoch)  # dropout and the like
        generator = generator_on(self.device, 2_000_003 * self.seed + epoch)
        self.model.train()
        policy.set_epoch((self.problem, self.solver), epoch, self.recipe.epochs)
        means = torch.zeros(3, dtype=torch.float64, device=self.device)
        looks = torch.zeros(3, dtype=torch.float64, device=self.device)
        parts = policy.policies((self.problem, self.solver)).values()  # once: it is 1 % of a step on the digits
        watch = Watch(lambda loss: self._check(loss, epoch))
        step_number = epoch * self.steps_per_epoch
        for number, group in enumerate(_groups(self.loader.epoch(epoch), self.recipe.accumulate)):
            examples = sum(len(batch) for batch in group)
            for _ in range(self.recipe.replays):
                self._follow_schedules(step_number)
                for part in parts:
                    part.set_step(step_number, self.recipe.epochs * self.steps_per_epoch)
                self.optimizer.zero_grad()
                for place, batch in enumerate(group, number * self.recipe.accumulate):
                    with autocast(self.precision, self.device):
                        step = self.solver.backward(
                            self.problem, self.model, batch, generator, weight=len(batch) / examples
                        )
                    check_coupling(step.losses, self.recipe.accumulate)
                    means += len(batch) * _measured(step)
                    self.recorder.note(batch, step.solution)
                    if place % LOOK_EVERY == 0:
                        looks += self._look(step.solution)
                        watch.see(step.loss)
                self.optimizer.step()
                if self.average is not None:
                    self.average.after_update(self.model)
                step_number += 1
        return means, looks

    def _alignment(self) -> float | None:
        few = self.held_out[slice(0, ALIGNED)]
        try:
            value = gradient_alignment(self.evaluated, few, self.problem.threat, seed=self.done).nanmean().item()
        except InputError:  # no threat, or one without a uniform draw
            return None
        return value if math.isfinite(value) else None

    def _check(self, value: float, epoch: int) -> None:
        if not math.isfinite(value):
            half = " or float32" if self.precision == "bfloat16" else ""
            raise BilevelError(
                f"the loss is {value} in epoch {epoch + 1}; a lower --lr (now {self.recipe.lr:g}){half} may help"
            )

    def _follow_schedules(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.recipe, step, self.steps_per_epoch)
            group["momentum"] = momentum_at(self.recipe, step, self.steps_per_epoch)

    def _look(self, solution: Solution) -> Tensor:
        """(correct on x + δ*, the sum of ‖δ*‖_∞, rows): what training saw, before the step is taken."""
        batch, delta = solution.batch, solution.delta
        with torch.no_grad(), attack_mode(self.model, "eval"), autocast(self.precision, self.device):
            right = self.model(batch.x + delta).argmax(1) == batch.y
        sizes = delta.flatten(1).abs().amax(1)
        return torch.stack([right.sum().double(), sizes.sum().double(), sizes.new_tensor(len(sizes)).double()])

    def state_dict(self) -> dict[str, Any]:
        """Weights, their average where there is one, optimiser, what the problem remembers, and the epochs done."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "problem": self.problem.state_dict(),
            "solver": policy.state_of(self.solver),
            "epochs": self.done,
        }
        if self.average is not None:
            state |= self.average.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.problem.load_state_dict(state["problem"])
        policy.load_state(self.solver, state["solver"])
        self.done = state["epochs"]
        if self.average is not None:
            self.average.load_state_dict(state)


def _measured(step: Hypergradient) -> Tensor:
    """(loss, ‖implicit term‖ / ‖∇_θ f‖, the cosine between the two), float64."""
    loss = step.loss.double()
    if not step.implicit:
        return torch.stack([loss, loss.new_zeros(()), loss.new_zeros(())])
    ratio = step.implicit_norm / step.direct_norm.clamp(min=1e-30)
    return torch.stack([loss, ratio.double(), step.implicit_cosine.double()])


def check_coupling(losses: Tensor, accumulate: int) -> None:
    """Refuse to add up parts of a batch whose examples are coupled: the sum is not the loss of the whole.

    Args:
        losses: the upper loss of a part, ``[B]`` or one number.
        accumulate: how many parts are added up.

    Raises:
        InputError: where the loss is one number and there are several parts.
    """
    if losses.ndim == 0 and accumulate > 1:
        raise InputError(
            f"--accumulate is {accumulate}, but the upper loss is one number for all of a batch, which has no parts to "
            "add up; use --accumulate 1"
        )


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """``size`` batches at a time; what is left at the end makes a smaller group."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
