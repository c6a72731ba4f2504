"""Step policies: the step 1/λ of a linearised lower level, one number or one per sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .errors import InputError
from .memory import SampleMemory

__all__ = ["Adaptive", "Constant", "Step", "step_policy"]


class Step:
    """Base class of the step policies."""

    def size(self, batch: Batch, gradient: Tensor, remember: bool = True) -> Tensor | float:
        """The step for each sample, a number or ``[B]``, from ∇_δ ℓ_atk(θ, z) ``[B, ...]``.

        ``remember=False`` computes it without keeping anything, for a solve at a held anchor.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define size(batch, gradient, remember)")

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called at the start of each epoch."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Constant(Step):
    """The same step, 1/λ: a positive number, or ``[B]`` for one batch. Raises :class:`InputError` otherwise."""

    value: Tensor | float

    def __post_init__(self) -> None:
        if not isinstance(self.value, Tensor):
            object.__setattr__(self, "value", positive("step", self.value))
        elif not (self.value > 0).all():
            raise InputError(f"step has values down to {self.value.min().item():g}; every step must be positive")

    def size(self, batch: Batch, gradient: Tensor, remember: bool = True) -> Tensor | float:
        return self.value


@dataclass
class Adaptive(Step):
    """step_i = γ / (c + √v_i) with v_i ← β v_i + (1 − β) ‖∇_δ ℓ_i‖₂², clipped to ``low … high``.

    gamma: γ > 0. c: c > 0, on the scale of **per-sample** gradients: values published for gradients of a batch mean are
        to be multiplied by that batch size. beta: β in [0, 1).
    low, high: 0 ≤ low ≤ high. warmup_step, warmup_epochs: during the first ``warmup_epochs`` the step is
        ``warmup_step``, and v is followed all the same.

    monotone: divide by v̂_i ← max(v̂_i, v_i) instead, which never decreases.

    v is kept per example (``batch.index``) and starts at 0. Raises :class:`InputError` for values outside these ranges,
    and where a batch has no index. Source: ATAS (Huang et al., 2023), equations 3 and 4; v̂ from A-SGD_BCA, section IV.
    """

    gamma: float
    c: float
    beta: float = 0.5
    low: float = 0.0
    high: float = math.inf
    warmup_step: float | None = None
    warmup_epochs: int = 0
    monotone: bool = False
    memory: SampleMemory = field(default_factory=SampleMemory, repr=False)
    largest: SampleMemory = field(default_factory=SampleMemory, repr=False)
    epoch: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        positive("gamma", self.gamma)
        positive("c", self.c)
        whole_number("warmup_epochs", self.warmup_epochs, 0)
        if self.warmup_step is not None:
            positive("warmup_step", self.warmup_step)
        if not 0 <= self.beta < 1:
            raise InputError(f"beta is {self.beta:g}; it must be in [0, 1)")
        if not 0 <= self.low <= self.high:
            raise InputError(
                f"steps are clipped to {self.low:g} … {self.high:g}; that range must be in order and at least 0"
            )

    def size(self, batch: Batch, gradient: Tensor, remember: bool = True) -> Tensor | float:
        """γ / (c + √v_i) ``[B]`` with v_i updated by ``gradient``, or the warm-up step."""
        square = gradient.flatten(1).square().sum(1)
        v = self.beta * self.memory.read(batch, torch.zeros_like(square)) + (1 - self.beta) * square
        if remember:
            self.memory.write(batch, v)
        if self.monotone:
            v = torch.maximum(v, self.largest.read(batch, torch.zeros_like(square)))
            if remember:
                self.largest.write(batch, v)
        if self.warmup_step is not None and self.epoch < self.warmup_epochs:
            return self.warmup_step
        return (self.gamma / (self.c + v.sqrt())).clamp(self.low, self.high)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return {**self.memory.state_dict(), "largest": self.largest.state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state)
        self.largest.load_state_dict(state["largest"])
        self.epoch = state["epoch"]


def positive(name: str, value: Any) -> float:
    """``value`` as a float, or an :class:`InputError` that names it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} is {value!r}; it must be a positive number")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{name} is {number:g}; it must be a positive finite number")
    return number


def whole_number(name: str, value: Any, least: int) -> int:
    """``value`` where it is an int of at least ``least``, or an :class:`InputError` that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number, at least {least}")
    return value


def step_policy(step: Step | float) -> Step:
    """The policy itself, or :class:`Constant` for a number."""
    return step if isinstance(step, Step) else Constant(positive("step", step))
