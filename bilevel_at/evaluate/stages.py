"""The stages of this library's own attacks. Each solves a lower problem for the images that are not broken yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from ..anchors import Anchor
from ..batch import Batch, per_sample
from ..constraints import Constraint
from ..errors import InputError
from ..losses import CrossEntropy, margins, minus
from ..lower import Linearized
from ..modes import attack_mode
from ..problem import LowerProblem, attack_mode_of
from ..targeted import Targeted
from .cycles import Cycles, rows_apart
from .threat import measured_reach

__all__ = ["Descent", "Margins", "NormalizedSteps", "OnSurrogate", "Scaled", "Stage", "passes"]


class Stage(Protocol):
    """One part of an attack: a restart, a group of classes, one of AutoAttack's four."""

    @property
    def name(self) -> str:
        """The stage's name in records."""

    def rows(self, classes: int) -> int:
        """The number of copies of an example in one forward pass."""

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Attacked images ``[B, ...]`` in x + C(x); the network is in eval mode."""


def passes(stage: Stage, classes: int) -> int:
    """The gradients that a stage takes for an image that it does not break, to estimate time by.

    That is ``stage.passes(classes)``, or 1 of a stage that does not say.
    """
    stated: Any = getattr(stage, "passes", None)
    return 1 if stated is None else max(1, int(stated(classes)))


@dataclass(frozen=True)
class Descent:
    """A lower problem solved ``steps`` times, each time from the last solution. For a linearised one, this is PGD.

    Args:
        lower: the lower problem.
        restart: the number of the restart, for the name.
        steps: how often it is solved.
        any_step: whether an example is broken if any of the solutions breaks it, and then not attacked further;
            otherwise only the last solution counts.
        cycles: whether an example whose solutions go in a cycle is left there, at the one that it would end with
            (:class:`~bilevel_at.evaluate.cycles.Cycles`). This is for lower problems that solve each example apart from
            the others, and from its last solution alone.

    Raises:
        ConvergenceError: if the lower problem raises it.
    """

    lower: LowerProblem
    restart: int = 0
    steps: int = 1
    any_step: bool = False
    cycles: bool = field(default=False, repr=False)  # the result is the same, and stored results have the repr

    @property
    def name(self) -> str:
        return f"start {self.restart + 1}"

    def rows(self, classes: int) -> int:
        return 1

    def passes(self, classes: int) -> int:
        return self.steps

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        attacked, left = batch.x.clone(), torch.arange(len(batch), device=batch.x.device)
        delta = None
        watch = Cycles(self.steps, generator) if self.cycles else None
        apart: bool | None = None
        lower = self._lower()
        for _ in range(self.steps):
            solution = lower.solve(model, batch, delta, generator)
            before, delta, output = delta, solution.delta, solution.kept_output
            del solution  # the graph of its output is not to be there beside the next step's
            if self.any_step and before is not None:
                stands = self._stands(model, batch, before, output)
                attacked[left[~stands]] = (batch.x + before)[~stands]
                left, batch, delta = left[stands], batch[stands], delta[stands]
                if watch is not None:
                    watch.keep(stands)
            del output
            if watch is not None and (ending := watch.see(delta)) is not None:
                if apart is None:
                    with attack_mode(model, attack_mode_of(lower)):
                        apart = rows_apart(model, batch.x + delta)
                if not apart:
                    watch = None
                    continue
                cycling, last = ending
                attacked[left[cycling]] = (batch.x + last)[cycling]
                left, batch, delta = left[~cycling], batch[~cycling], delta[~cycling]
                watch.keep(~cycling)
            if len(left) == 0:
                return attacked
        if delta is not None:
            attacked[left] = batch.x + delta
        return attacked

    def _lower(self) -> LowerProblem:
        """The lower problem; where every step is looked at, one that keeps the network's output where it solves from.

        That is set here, and not in the stage's own lower problem, because stored results have its repr.
        """
        lower = self.lower
        if self.any_step and type(lower) is Linearized and isinstance(lower.attack_loss, minus):
            plain = isinstance(lower.attack_loss.loss, CrossEntropy)  # whose output is the network's
            return replace(lower, keep_output=plain)
        return lower

    def _stands(self, model: nn.Module, batch: Batch, delta: Tensor, output: Any) -> Tensor:
        """Whether the network is right on x + δ, ``[B]``, by the output there that the solve from δ kept, if it did."""
        with torch.no_grad():
            answers = model(batch.x + delta) if output is None else output
            return answers.argmax(1) == batch.y


class NormalizedSteps(torch.optim.Optimizer):
    """η_i ← η_i − lr · ∇_i / ‖∇_i‖₂, row by row: the ℓ2 counterpart of elementwise optimisers."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for row in group["params"]:
                if row.grad is not None:
                    length = row.grad.flatten(1).norm(dim=1).clamp(min=1e-38)
                    row.sub_(row.grad / per_sample(length, row.grad), alpha=group["lr"])
        return loss


class Best:
    """The perturbation of the largest value so far, for each row."""

    value: Tensor
    delta: Tensor

    def consider(self, value: Tensor, delta: Tensor) -> None:
        if not hasattr(self, "value"):
            self.value, self.delta = value, delta.clone()
            return
        better = value > self.value
        self.value = torch.where(better, value, self.value)
        self.delta = torch.where(per_sample(better, delta), delta, self.delta)


class Watched:
    """An attack loss, −M_t for the targets t, that records the best perturbation of each row.

    ``aimed`` is the best by the target's margin; ``any_class`` is the best by the largest margin, max_j M_j, because a
    step towards one class may reach another, which breaks the example too.
    """

    def __init__(self) -> None:
        self.aimed, self.any_class = Best(), Best()

    def __call__(self, model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
        every_margin = margins(model, batch, delta)
        aimed = every_margin.gather(1, batch.more["target"][:, None]).squeeze(1)
        self.aimed.consider(aimed.detach(), delta.detach())
        self.any_class.consider(every_margin.detach().amax(1), delta.detach())
        return -aimed

    def of_each(self, examples: int) -> Tensor:
        """The perturbation of the largest margin among each example's rows, ``[examples, ...]``."""
        rows = self.any_class.value.reshape(examples, -1)
        best = rows.argmax(1) + torch.arange(examples, device=rows.device) * rows.shape[1]
        return self.any_class.delta[best]


@dataclass(frozen=True)
class Margins:
    """BETA's lower level (Robey et al., 2023, Algorithm 1) on all classes, or on some of the ranks by clean margin.

    Args:
        constraint: C(x).
        steps: the total number of optimizer steps for each class; every step counts, not only the last.
        rate: the initial learning rate, which falls to 0 linearly.
        restart: the number of the restart, for the name.
        ranks: the first rank and the last + 1, from 0; (N, None) is all but the N nearest classes; None is all.
        starts: the number of starts. Several share two thirds of the steps; the best one continues with the rest, from
            a quarter of the rate. A single start misses some examples by chance (docs/evaluation.md).
        optimizer: any elementwise one of torch's, or :class:`NormalizedSteps`, which is needed for progress in an ℓ2
            ball.
        start: the anchor of each start.
    """

    constraint: Constraint
    steps: int
    rate: float
    restart: int = 0
    ranks: tuple[int, int | None] | None = None
    starts: int = 1
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.RMSprop
    start: Anchor | str = field(default="uniform", repr=False)

    @property
    def name(self) -> str:
        if self.ranks is None:
            return f"start {self.restart + 1}"
        first, end = self.ranks
        return f"start {self.restart + 1}, " + (f"nearest {end}" if end is not None else "other classes")

    def rows(self, classes: int) -> int:
        return max(1, len(self._ranks(classes)))

    def passes(self, classes: int) -> int:
        return self.steps * self.rows(classes)

    def _ranks(self, classes: int) -> range:
        first, end = self.ranks or (0, None)
        return range(first, classes - 1 if end is None else min(end, classes - 1))

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            ranks = self._ranks(model(batch.x[:1]).shape[-1])
        if self.ranks is not None and not ranks:
            return batch.x
        seen, chosen = Watched(), None if self.ranks is None else ranks

        def descend(steps: int, rate: float, anchor: Tensor | None = None) -> None:
            down = partial(LinearLR, start_factor=1.0, end_factor=1 / steps, total_iters=steps)
            lower = Targeted(
                self.constraint, seen, self.optimizer, steps, rate, schedule=down, ranks=chosen, anchor=self.start
            )
            lower.solve(model, batch, anchor, generator)

        if self.starts == 1:
            descend(self.steps, self.rate)
        else:
            short = max(1, 2 * self.steps // (3 * self.starts))
            for _ in range(self.starts):
                descend(short, self.rate)
            descend(max(1, self.steps - self.starts * short), self.rate / 4, seen.aimed.delta)
        return batch.x + seen.of_each(len(batch))


@dataclass(frozen=True)
class Scaled:
    """A stage in a constraint of unknown size, which is measured for each batch.

    constraint: the set.
    direction: of the steps, which says in what norm it is measured.
    unit: the stage for a set of reach 1, for its name and its rows.
    make: from a reach to the stage.
    """

    constraint: Constraint
    direction: str
    unit: Stage
    make: Callable[[float], Stage] = field(repr=False)

    @property
    def name(self) -> str:
        return self.unit.name

    def rows(self, classes: int) -> int:
        return self.unit.rows(classes)

    def passes(self, classes: int) -> int:
        return passes(self.unit, classes)

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        return self.make(measured_reach(self.constraint, batch.x, self.direction))(model, batch, generator)


@dataclass(frozen=True)
class OnSurrogate:
    """A stage against a surrogate network; its images are then classified by the evaluated network."""

    stage: Stage
    surrogate: nn.Module = field(repr=False)
    source: str = "the surrogate"

    def check(self, batch: Batch, classes: int) -> None:
        """Check that the surrogate suits the images.

        Args:
            batch: the first batch.
            classes: of the evaluated network.

        Raises:
            InputError: if the surrogate does not accept the images, or has another number of classes.
        """
        surrogate = self.surrogate.to(batch.x.device)
        try:
            with torch.no_grad(), attack_mode(surrogate, "eval"):
                output: Any = tuple(surrogate(batch.x[:1]).shape)
        except RuntimeError:
            output = "an error"
        if output != (1, classes):
            shape = list(batch.x.shape[1:])
            raise InputError(f"{self.source} gives {output} for an image of {shape}; a transfer needs (1, {classes})")

    @property
    def name(self) -> str:
        return self.stage.name

    def rows(self, classes: int) -> int:
        return self.stage.rows(classes)

    def passes(self, classes: int) -> int:
        return passes(self.stage, classes)

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        surrogate = self.surrogate.to(batch.x.device)
        with attack_mode(surrogate, "eval"):
            return self.stage(surrogate, batch, generator)
