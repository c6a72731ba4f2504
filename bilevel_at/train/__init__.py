"""The trainer, which only repeats; recipes; and run directories."""

from __future__ import annotations

from .recipe import Recipe
from .rundir import RunDir, load
from .trainer import Epoch, Trainer, rank

__all__ = ["Epoch", "Recipe", "RunDir", "Trainer", "load", "rank"]
