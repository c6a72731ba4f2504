"""Step policies: the step 1/λ of a linearised lower level, one number or one per sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .errors import InputError, at_least, positive, whole_number
from .memory import SampleMemory
from .policy import Number, Policy, checked, number
from .solution import Hypergradient

__all__ = ["Adaptive", "Constant", "Step", "step_policy"]


class Step(Policy):
    """Base class of the step policies."""

    def size(self, batch: Batch, gradient: Tensor) -> Tensor | float:
        """The step for each sample, a number or ``[B]``.

        Args:
            batch: the examples.
            gradient: ∇_δ ℓ_atk(θ, z) ``[B, ...]``, detached.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define size(batch, gradient)")


@dataclass(frozen=True, eq=False)
class Constant(Step):
    """The same step, 1/λ, for every batch.

    Args:
        value: a positive number, ``[B]`` for one batch, or a :class:`~bilevel_at.Schedule`.

    Raises:
        InputError: where a step is not positive.
    """

    value: Tensor | Number

    def __post_init__(self) -> None:
        if isinstance(self.value, Tensor):
            if not (self.value > 0).all():
                raise InputError(f"step has values down to {self.value.min().item():g}; every step must be positive")
        else:
            object.__setattr__(self, "value", checked(positive, "step", self.value))

    def size(self, batch: Batch, gradient: Tensor) -> Tensor | float:
        return self.value if isinstance(self.value, Tensor) else positive("step", number(self.value))


@dataclass(eq=False)
class Adaptive(Step):
    """step_i = γ / (c + √v_i) with v_i ← β v_i + (1 − β) ‖∇_δ ℓ_i‖₂², clipped to ``low … high``.

    v is remembered per example (``batch.index``) and starts at 0. Source: ATAS (Huang et al., 2023), equations 3 and 4.

    Args:
        gamma: γ > 0, a number or a :class:`~bilevel_at.Schedule`.
        c: c > 0, on the scale of **per-sample** gradients: values published for gradients of a batch mean are to be
            multiplied by that batch size.
        beta: β in [0, 1).
        low: the least step, at least 0.
        high: the greatest step, at least ``low``.
        warmup_step: the step during the warm-up, likewise.
        warmup_epochs: how many epochs the warm-up takes.
        follow_warmup: whether v follows the gradients of the warm-up too, or starts after it.

    Raises:
        InputError: for values outside these ranges, and where a batch has no index.
    """

    gamma: Number
    c: float
    beta: float = 0.5
    low: float = 0.0
    high: float = math.inf
    warmup_step: Number | None = None
    warmup_epochs: int = 0
    follow_warmup: bool = False
    memory: SampleMemory = field(default_factory=SampleMemory, repr=False)
    epoch: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        checked(positive, "gamma", self.gamma)
        positive("c", self.c)
        whole_number("warmup_epochs", self.warmup_epochs, 0)
        if self.warmup_step is not None:
            checked(positive, "warmup_step", self.warmup_step)
        if not 0 <= at_least("beta", self.beta) < 1:
            raise InputError(f"beta is {self.beta:g}; it must be in [0, 1)")
        if not 0 <= self.low <= self.high:
            raise InputError(
                f"steps are clipped to {self.low:g} … {self.high:g}; that range must be in order and at least 0"
            )

    @property
    def warming_up(self) -> bool:
        return self.warmup_step is not None and self.epoch < self.warmup_epochs

    def square(self, batch: Batch, gradient: Tensor) -> Tensor:
        """v_i with this gradient in it, ``[B]``; changes nothing."""
        square = gradient.flatten(1).square().sum(1)
        return self.beta * self.memory.read(batch, torch.zeros_like(square)) + (1 - self.beta) * square

    def size(self, batch: Batch, gradient: Tensor) -> Tensor | float:
        """γ / (c + √v_i) ``[B]``, or the warm-up step."""
        v = self.square(batch, gradient)  # during the warm-up too, so that a missing index is noticed at once
        if self.warmup_step is not None and self.warming_up:
            return number(self.warmup_step)
        return (number(self.gamma) / (self.c + v.sqrt())).clamp(self.low, self.high)

    def observe(self, step: Hypergradient) -> None:
        gradient, batch = step.solution.attack_gradient, step.solution.batch
        if gradient is not None and (self.follow_warmup or not self.warming_up):
            self.memory.write(batch, self.square(batch, gradient))

    def set_epoch(self, epoch: int, epochs: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state)


def step_policy(step: Step | Number) -> Step:
    """The policy itself, or :class:`Constant` for a number or a schedule."""
    return step if isinstance(step, Step) else Constant(step)
