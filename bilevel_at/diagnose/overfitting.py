"""Robust overfitting: what the last epoch has lost since the best one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..runs.metrics import rank

__all__ = ["RobustOverfitting", "best_last_gap"]


@dataclass(frozen=True)
class RobustOverfitting:
    """The held-out robust accuracies of the best and of the last epoch, the epochs, and ``gap`` = best − last."""

    best: float
    last: float
    best_epoch: int
    last_epoch: int

    @property
    def gap(self) -> float:
        return self.best - self.last

    def __str__(self) -> str:
        return (
            f"robust accuracy {self.best:.1%} in epoch {self.best_epoch}, {self.last:.1%} in epoch {self.last_epoch}, "
            f"the last: {100 * self.gap:.1f} points lost"
        )


def best_last_gap(metrics: Sequence[Mapping[str, Any]]) -> RobustOverfitting:
    """max_e R_e − R_last, R_e the held-out robust accuracy of epoch e, at least 0.

    metrics: the lines of a run's ``metrics.jsonl``. The best epoch is the one that ``best.pt`` keeps
    (:func:`bilevel_at.train.rank`). Choosing it by the same held-out images makes it look a little better than it is.

    Raises :class:`InputError` where there are no epochs. Source: Rice et al. (2020), who name it robust overfitting.
    """
    if not metrics:
        raise InputError("there are no epochs to compare; metrics are the lines of a run's metrics.jsonl")
    best, last = max(metrics, key=rank), metrics[-1]
    return RobustOverfitting(best["robust"], last["robust"], best["epoch"], last["epoch"])
