"""The parts that this library's own attacks are made of: each solves a lower problem for images still standing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from ..anchors import Anchor
from ..batch import Batch, per_sample
from ..constraints import Constraint
from ..errors import InputError
from ..losses import margins
from ..modes import attack_mode
from ..problem import LowerProblem
from ..targeted import Targeted
from .threat import measured_reach

__all__ = ["Descent", "Margins", "NormalizedSteps", "OnSurrogate", "Scaled", "Stage"]


class Stage(Protocol):
    """One part of an attack: a restart, a group of classes, one of AutoAttack's four."""

    @property
    def name(self) -> str:
        """What the record calls it."""

    def rows(self, classes: int) -> int:
        """How many copies of an example it sends through the network at once."""

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Attacked images ``[B, ...]`` in x + C(x); the network is in eval mode."""


@dataclass(frozen=True)
class Descent:
    """One draw of a lower problem, solved ``steps`` times, each time from the last solution: PGD, for a linearised one.

    any_step: an example is broken where any of the solutions breaks it, and is then left alone; otherwise the last one
        counts. Raises :class:`ConvergenceError` where the lower problem does.
    """

    lower: LowerProblem
    restart: int = 0
    steps: int = 1
    any_step: bool = False

    @property
    def name(self) -> str:
        return f"start {self.restart + 1}"

    def rows(self, classes: int) -> int:
        return 1

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        attacked, left = batch.x.clone(), torch.arange(len(batch), device=batch.x.device)
        delta = None
        for _ in range(self.steps):
            delta = self.lower.solve(model, batch, delta, generator).delta
            if self.any_step:
                attacked[left] = batch.x + delta
                with torch.no_grad():
                    standing = model(batch.x + delta).argmax(1) == batch.y
                left, batch, delta = left[standing], batch[standing], delta[standing]
                if len(left) == 0:
                    return attacked
        if not self.any_step and delta is not None:
            attacked = batch.x + delta
        return attacked


class NormalizedSteps(torch.optim.Optimizer):
    """η_i ← η_i − lr · ∇_i / ‖∇_i‖₂, each row by itself: to a ball what elementwise optimisers are to a box."""

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
    """Of all the perturbations it was shown, each row's of the largest value."""

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
    """An attack loss, −M_t for the targets t, that keeps the best perturbation it has seen of each row.

    aimed: by the target's margin. any_class: by the widest margin, max_j M_j: a step towards one class may cross into
    another, and a later one come back, and either breaks the example.
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
        """The perturbation of the widest margin among each example's rows, ``[examples, ...]``."""
        rows = self.any_class.value.reshape(examples, -1)
        best = rows.argmax(1) + torch.arange(examples, device=rows.device) * rows.shape[1]
        return self.any_class.delta[best]


@dataclass(frozen=True)
class Margins:
    """BETA's lower level (Robey et al., 2023, Algorithm 1) on all classes, or on some of the ranks by clean margin.

    steps: the optimizer's, for each class, in all; each counts, not only the last. rate: the first, falling to 0
    linearly. starts: several share two thirds of the steps, and the best goes on with the rest from a quarter of the
    rate: what a single start misses is mostly a matter of luck (docs/evaluation.md). ranks: the first and the last + 1,
    from 0; (N, None) is all but the N nearest. optimizer: any elementwise one of torch's, or
    :class:`NormalizedSteps`, without which nothing gets far in an ℓ2 ball.
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
    """A stage in a set that does not state its size, which is measured anew for each batch.

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

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        return self.make(measured_reach(self.constraint, batch.x, self.direction))(model, batch, generator)


@dataclass(frozen=True)
class OnSurrogate:
    """A stage against another network, whose images are then shown to the one that is evaluated."""

    stage: Stage
    surrogate: nn.Module = field(repr=False)
    source: str = "the surrogate"

    def check(self, batch: Batch, classes: int) -> None:
        """Raise :class:`InputError` where the surrogate does not take such images, or knows other classes."""
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

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        surrogate = self.surrogate.to(batch.x.device)
        with attack_mode(surrogate, "eval"):
            return self.stage(surrogate, batch, generator)
