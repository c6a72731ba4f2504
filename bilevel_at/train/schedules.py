"""Schedules of the learning rate and the momentum."""

from __future__ import annotations

import math

from ..runs.recipe import Recipe

__all__ = ["momentum_at", "rate_at"]


def rate_at(recipe: Recipe, step: int, per_epoch: int) -> float:
    """The learning rate of an update.

    recipe: its schedule, peak rate and number of epochs.
    step: the update's number, from 0.
    per_epoch: updates in an epoch.
    """
    if recipe.schedule == "linear":
        return recipe.lr * _height(recipe, step, per_epoch)
    if recipe.schedule in ("one-cycle", "one-cycle-by-epoch"):
        rising, share = _cycle(recipe, step, per_epoch)
        first, last = recipe.lr / START, recipe.lr / START / END
        return _cosine(first, recipe.lr, share) if rising else _cosine(recipe.lr, last, share)
    if recipe.schedule == "multistep":
        return recipe.lr * 0.1 ** sum(step // per_epoch >= milestone for milestone in recipe.milestones)
    return recipe.lr


def momentum_at(recipe: Recipe, step: int, per_epoch: int) -> float:
    """The momentum of an update: from ``momentum`` to ``peak_momentum``, where the rate peaks, and back.

    It moves as the rate does, in straight lines or along cosines.

    recipe, step, per_epoch: as for :func:`rate_at`.
    """
    if recipe.peak_momentum is None:
        return recipe.momentum
    if recipe.schedule in ("one-cycle", "one-cycle-by-epoch"):
        rising, share = _cycle(recipe, step, per_epoch)
        return _cosine(recipe.momentum, recipe.peak_momentum, share if rising else 1 - share)
    return recipe.momentum + (recipe.peak_momentum - recipe.momentum) * _height(recipe, step, per_epoch)


def _height(recipe: Recipe, step: int, per_epoch: int) -> float:
    """The triangle over all updates: 0 before the first and after the last, 1 in the middle."""
    progress = (step + 1) / (recipe.epochs * per_epoch + 1)
    return 2 * min(progress, 1 - progress)


# PyTorch's OneCycleLR by its default arguments: from lr/25 in the first 30 % to lr, and then to lr/25/1e4.
START, END, RISES = 25.0, 1e4, 0.3


def _cycle(recipe: Recipe, step: int, per_epoch: int) -> tuple[bool, float]:
    """(whether the rate rises, what share of its rise or fall is behind)."""
    # A single epoch has no epochs to go by: it would be spent at the last rate, 4e-6 lr.
    by_epoch = recipe.schedule == "one-cycle-by-epoch" and recipe.epochs > 1
    now, total = (step // per_epoch, recipe.epochs) if by_epoch else (step, recipe.epochs * per_epoch)
    peak = RISES * total - 1
    if now <= peak:
        return True, now / peak if peak > 0 else 1.0
    return False, (now - peak) / (total - 1 - peak)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
