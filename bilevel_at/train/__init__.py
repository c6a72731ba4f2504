"""The trainer, which only repeats; recipes; and run directories.

Importing this package is light, because every problem file imports its recipe from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..runs.metrics import Epoch, catastrophic_overfitting, rank
from ..runs.recipe import CIFAR, DIGITS, IMAGENET, Recipe

if TYPE_CHECKING:
    from ..runs.directory import RunDir
    from ..runs.networks import load
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

_ON_DEMAND = {"RunDir": "..runs.directory", "Trainer": ".trainer", "load": "..runs.networks"}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_DEMAND[name], __name__), name)
