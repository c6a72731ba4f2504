"""Epochs of ``zero_grad``, ``backward``, ``step``; after each, a look at the held-out tenth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .. import policy, shares
from ..data import Images, ImageSet, Loader
from ..diagnose import gradient_alignment
from ..errors import InputError
from ..evaluate import Attack, Trace, attack_examples
from ..modes import attack_mode, autocast
from ..problem import BilevelProblem
from ..runs.metrics import Epoch
from ..runs.recipe import Recipe
from ..solver import Solver
from .averages import WeightAverage
from .finite import LeftOut, NotFinite, Sentinel, first_not_finite, leaving_out
from .memory_format import FORMATS, MemoryFormat
from .position import Position, own_randomness
from .recorder import Recorder
from .replicas import Reducer, check_replicas, check_single_rows, check_states, remembers_by_example
from .schedules import momentum_at, rate_at
from .steps import Dealt, check_coupling, groups_of, look, measured

__all__ = ["Trainer"]

ALIGNED = 256  # held-out examples whose input gradients are compared
ROWS = 512  # held-out examples that are attacked at a time
LOOK_EVERY = 16  # batches; a forward pass on one in 16 costs a fiftieth of a standard step


class Trainer:
    """Trains ``model`` on ``problem`` with ``solver``.

        for epoch in trainer.epochs():    # an Epoch, after each epoch
            ...

    Randomness depends on ``(seed, epoch)`` alone, and a state may be taken between any two updates, in ``between``; a
    run resumed from :meth:`state_dict` gives the same bits as an unbroken one. Torch's global generators and the modes
    of the network's modules are the caller's again after each epoch.

    Args:
        problem, solver, model: what is trained, and how.
        train, held_out: images.
        recipe: settings.
        attack: on the held-out images.
        seed: of the order of the data, and every draw.
        precision: "float32", or "bfloat16" for autocast; parameters, perturbations and what is remembered are float32
            either way.
        extra: more training images, of which the recipe's ``extra_fraction`` of each batch is drawn.
        memory_format: of the network's weights, in place; None leaves them as they are.
        skip_nonfinite: leave out updates whose loss or gradient is not finite, and count them.
        between: called after every update and every batch of the held-out images' attack; it may take
            :meth:`state_dict` and raise.
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
        skip_nonfinite: bool = False,
        between: Callable[[], None] | None = None,
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
        self.reducer = Reducer(model)
        self.by_index = remembers_by_example((problem, solver))
        check_single_rows(model, self.loader, self.by_index)
        self.recorder = Recorder(self.loader.labels, model)
        self.average = WeightAverage(model, recipe) if recipe.averages else None
        self.skip_nonfinite, self.between = skip_nonfinite, between
        self.done = 0
        self.position: Position | None = None
        self._resumed = False
        half = " or float32" if precision == "bfloat16" else ""
        leave = "" if skip_nonfinite else " or --skip-nonfinite"
        remedy = f"a lower --lr (now {recipe.lr:g}){half}{leave} may help"
        self.sentinel = Sentinel(model, type(solver).__name__, remedy)

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
            before = self.position.seconds if self.position is not None and self._resumed else 0.0
            training = self.train_epoch(self.done)
            clean = self._standing(Attack("clean"))
            robust = self._standing(self.attack, seed=self.done)
            lr = self.optimizer.param_groups[0]["lr"]
            self.done += 1
            self.position = None
            yield Epoch(
                epoch=self.done,
                clean=clean,
                robust=robust,
                attack=self.attack.name,
                alignment=self._alignment(),
                lr=lr,
                seconds=before + time.perf_counter() - start,
                **training,
            )

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the training set as epoch ``epoch`` (from 0), or what is left of it in a run that is resumed.

        What it measured, by the names of :class:`Epoch`. Raises :class:`NotFinite` where a loss or a weight is not
        finite.
        """
        position = self._take_up(epoch)
        check_replicas(self.model)
        if position.measured is not None:  # it was stopped in the evaluation that follows
            return position.measured
        start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with own_randomness(position, self._global_seed(epoch)):
            self._train(position)
            self.check()
            if self.average is not None:
                self.average.after_epoch(self.model, epoch + 1, self._images(epoch))
                self._check_average()
        check_replicas(self.evaluated)
        self.recorder.close_epoch(self.evaluated)
        examples = len(self.loader.images) * self.recipe.replays - position.left_out
        if not examples:
            raise NotFinite(f"every update of epoch {epoch + 1} was left out; {self.sentinel.remedy}")
        loss, ratio_mean, cosine_mean = (shares.summed(position.means) / examples).tolist()
        right, size, rows = shares.summed(position.looks).tolist()
        position.measured = {
            "loss": loss,
            "implicit_ratio": ratio_mean,
            "implicit_cosine": cosine_mean,
            "train": right / max(rows, 1),
            "perturbation": size / max(rows, 1),
            "train_seconds": position.seconds + time.perf_counter() - start,
            "memory": torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0,
            "skipped": position.skipped,
        }
        return position.measured

    def train_batches(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The updates of epoch ``epoch`` (from 0), without a wait for the device; :meth:`train_epoch` without its end.

        Returns, on the device, the sums over this process's examples of (loss, share of the implicit term, its cosine),
        and those of :func:`~.steps.look`. Raises :class:`NotFinite` soon after a loss that is not finite.
        """
        position = self._take_up(epoch)
        with own_randomness(position, self._global_seed(epoch)):
            self._train(position)
        return position.means, position.looks

    def _global_seed(self, epoch: int) -> int:
        """Of torch's global generators (dropout and the like), which each process has of its own."""
        return 1_000_003 * self.seed + epoch + 500_009 * shares.rank()

    def _images(self, epoch: int) -> Iterator[Tensor]:
        """The epoch's images, each process's own."""
        for batch, share in self.loader.dealt(epoch, 0, self.by_index):
            with shares.sharing(share):
                yield batch.x

    def _take_up(self, epoch: int) -> Position:
        """The position of a state that was loaded, or the beginning of the epoch."""
        self.reducer.start_epoch()
        if self.position is None or not self._resumed or self.position.epoch != epoch:
            self.position = Position.start(epoch, self.seed, self.device)
            policy.set_epoch((self.problem, self.solver), epoch, self.recipe.epochs)
        self._resumed = False
        return self.position

    def _train(self, position: Position) -> None:
        """The updates that are left of the position's epoch."""
        replays, accumulate = self.recipe.replays, self.recipe.accumulate
        parts = list(policy.policies((self.problem, self.solver)).values())  # once: it is 1 % of a step on the digits
        first = position.updates // replays
        groups = groups_of(self.loader.dealt(position.epoch, first * accumulate, self.by_index), accumulate)
        with attack_mode(self.model, "train"), self._guard():
            for number, group in enumerate(groups, first):
                while position.updates < (number + 1) * replays:
                    self._update(position, group, number * accumulate, parts)
                    position.updates += 1
                    if self.between is not None:
                        self.between()

    def _guard(self) -> AbstractContextManager[None]:
        return leaving_out(self.solver, self.model) if self.skip_nonfinite else nullcontext()

    def _update(self, position: Position, group: list[Dealt], place: int, parts: list[policy.Policy]) -> None:
        """One update of θ, on batches ``place``, ``place + 1``, … of the epoch."""
        step_number = position.epoch * self.steps_per_epoch + position.updates
        self._follow_schedules(step_number)
        for part in parts:
            part.set_step(step_number, self.recipe.epochs * self.steps_per_epoch)
        self.optimizer.zero_grad()
        sizes = [len(batch) if share is None else share.whole for batch, share in group]
        examples = left = sum(sizes)
        mine = sum(len(batch) for batch, share in group if share is None or not share.idle)
        try:
            for number, ((batch, share), size) in enumerate(zip(group, sizes, strict=True), place):
                with shares.sharing(share), autocast(self.precision, self.device):
                    step = self.solver.backward(
                        self.problem, self.model, batch, position.generator, weight=size / examples
                    )
                check_coupling(step.losses, self.recipe.accumulate)
                left -= size
                if share is not None and share.idle:
                    continue
                self.sentinel.note(step_number, position.epoch, batch, step.losses)
                position.means += len(batch) * measured(step)
                self.recorder.note(batch, step.solution, position.updates)
                if number % LOOK_EVERY == 0:
                    position.looks += look(self.model, step.solution, self.precision)
                    self.sentinel.look(position.means[0])
        except LeftOut:
            position.skipped += 1
            position.left_out += left
            return
        self.reducer.add_up(mine)
        self.optimizer.step()
        if self.average is not None:
            self.average.after_update(self.model)

    def check(self) -> None:
        """Raise :class:`NotFinite` where a loss was, or a weight is, not finite; waits for the device."""
        self.sentinel.check()
        self._check_average()

    def _check_average(self) -> None:
        if self.evaluated is not self.model and (name := first_not_finite(self.evaluated)) is not None:
            raise NotFinite(f"{name} of the averaged network is not finite; {self.sentinel.remedy}")

    def _standing(self, attack: Attack, seed: int = 0) -> float:
        """Accuracy on the held-out images under an attack."""
        trace = Trace.start(len(self.held_out), self.device)
        for _ in attack_examples(self.evaluated, self.held_out, attack, seed=seed, batch_size=ROWS, trace=trace):
            if self.between is not None:
                self.between()
        return trace.correct.float().mean().item()

    def _alignment(self) -> float | None:
        few = self.held_out[slice(0, ALIGNED)]
        try:
            value = gradient_alignment(self.evaluated, few, self.problem.threat, seed=self.done).nanmean().item()
        except (InputError, shares.Elsewhere):  # no threat, or one without a uniform draw
            return None
        return value if math.isfinite(value) else None

    def _follow_schedules(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.recipe, step, self.steps_per_epoch)
            group["momentum"] = momentum_at(self.recipe, step, self.steps_per_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Weights, their average where there is one, optimiser, what the problem remembers, and the epochs done.

        Inside an epoch, the position in it too. To be taken between updates: in ``between``, or between epochs.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "problem": self.problem.state_dict(),
            "solver": policy.state_of(self.solver),
            "epochs": self.done,
        }
        check_states(state)
        if self.average is not None:
            state |= self.average.state_dict()
        if self.position is not None and self.position.under_way:
            unsaved = self.position.measured is not None
            state["position"] = self.position.state_dict() | {"recorder": self.recorder.state_dict(int(unsaved))}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["epochs"]
        self._resumed = "position" in state
        if self._resumed:
            self.position = Position.from_state(state["position"], self.seed, self.device)
            self.recorder.load_state_dict(state["position"]["recorder"])
            # Policies are told of an epoch before they take up their state in it.
            policy.set_epoch((self.problem, self.solver), self.done, self.recipe.epochs)
        self.problem.load_state_dict(state["problem"])
        policy.load_state(self.solver, state["solver"])
        if self.average is not None:
            self.average.load_state_dict(state)
