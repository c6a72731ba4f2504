"""The trainer, which only repeats; recipes; and run directories."""

from __future__ import annotations

from ..runs.directory import RunDir
from ..runs.metrics import Epoch, catastrophic_overfitting, rank
from ..runs.networks import load
from ..runs.recipe import CIFAR, DIGITS, IMAGENET, Recipe
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
