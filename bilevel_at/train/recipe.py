"""How to train: the published settings of a method on a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..data.loader import Augment

__all__ = ["Recipe", "Schedule", "default_recipe"]

Schedule = Literal["linear", "multistep", "constant"]


@dataclass(frozen=True)
class Recipe:
    """SGD settings, and the arguments of ``problem(...)`` that differ from its defaults on this data set.

    schedule: "linear" goes 0 → lr over the first half of all steps and back to 0, per step; "multistep" divides by
        10 after each epoch of ``milestones``; "constant" stays at lr.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    schedule: Schedule = "linear"
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: Augment = "none"
    model: str = "small_cnn"
    problem: Mapping[str, Any] = field(default_factory=dict)

    def lr_at(self, step: int, per_epoch: int) -> float:
        """The learning rate of optimiser step ``step`` (from 0) with ``per_epoch`` steps in an epoch."""
        if self.schedule == "linear":
            progress = (step + 1) / (self.epochs * per_epoch + 1)
            return self.lr * 2 * min(progress, 1 - progress)
        if self.schedule == "multistep":
            return self.lr * 0.1 ** sum(step // per_epoch >= m for m in self.milestones)
        return self.lr


def default_recipe(data: str) -> Recipe:
    """What is used where a problem file states nothing for this data set."""
    if data == "digits":
        return Recipe(batch_size=64, problem={"epsilon": 0.2})
    return Recipe()
