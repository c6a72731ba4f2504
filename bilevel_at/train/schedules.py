"""Schedules of the learning rate and the momentum."""

from __future__ import annotations

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
    if recipe.schedule == "multistep":
        return recipe.lr * 0.1 ** sum(step // per_epoch >= milestone for milestone in recipe.milestones)
    return recipe.lr


def momentum_at(recipe: Recipe, step: int, per_epoch: int) -> float:
    """The momentum of an update: from ``momentum`` to ``peak_momentum``, where the rate peaks, and back.

    recipe, step, per_epoch: as for :func:`rate_at`.
    """
    if recipe.peak_momentum is None:
        return recipe.momentum
    return recipe.momentum + (recipe.peak_momentum - recipe.momentum) * _height(recipe, step, per_epoch)


def _height(recipe: Recipe, step: int, per_epoch: int) -> float:
    """The triangle over all updates: 0 before the first and after the last, 1 in the middle."""
    progress = (step + 1) / (recipe.epochs * per_epoch + 1)
    return 2 * min(progress, 1 - progress)
