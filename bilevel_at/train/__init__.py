"""The trainer, which only repeats; recipes; and run directories."""

from __future__ import annotations

from .metrics import Epoch, catastrophic_overfitting, rank
from .recipe import CIFAR, DIGITS, IMAGENET, Recipe
from .rundir import RunDir, load
from .trainer import Trainer

__all__ = [
    "CIFAR",
    "DIGITS",
    "IMAGENET",
    "Epoch",
    "Recipe",
    "RunDir",
    "Trainer",
    "catastrophic_overfitting",
    "load",
    "rank",
]
