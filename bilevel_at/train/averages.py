"""Averages of a network's weights: exponential, of every update; or equal, of the epochs' ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from .. import shares
from ..distributed import average_statistics
from ..runs.recipe import Recipe

__all__ = ["WeightAverage"]


class WeightAverage:
    """An average θ̄ of the weights θ, which starts at the first θ that it includes.

    Exponential, where the recipe has ``ema``: θ̄ ← ema · θ̄ + (1 − ema) · θ after every update. Equal, where it has
    ``average_from``: the mean of θ at the end of that epoch and of every later one (Izmailov et al., 2018).
    Batch-normalisation statistics are averaged alike, or, where the recipe has ``reestimate``, those that the averaged
    network has on the training images, unattacked.

    model: whose weights are averaged.
    recipe: says how.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.by_update, self.start, self.reestimate = recipe.ema > 0, recipe.average_from, recipe.reestimate
        average = get_ema_multi_avg_fn(recipe.ema) if self.by_update else None
        self._averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=not recipe.reestimate)

    @property
    def network(self) -> nn.Module:
        """The network with the averaged weights."""
        return self._averaged.module

    @property
    def started(self) -> bool:
        """Whether anything has been averaged."""
        return bool(self._averaged.n_averaged > 0)

    def after_update(self, model: nn.Module) -> None:
        """Include the weights after an update, in an exponential average."""
        if self.by_update:
            self._averaged.update_parameters(model)

    def after_epoch(self, model: nn.Module, epoch: int, images: Iterable[Tensor]) -> None:
        """Include the weights after epoch ``epoch`` (from 1), in an equal average; re-estimate the statistics.

        images: batches to estimate them from; of several processes, each one's own, in its share of a batch.
        """
        if not self.by_update and epoch >= self.start:
            self._averaged.update_parameters(model)
        if self.reestimate and self.started:
            counts: list[int] = []
            with torch.no_grad():
                update_bn(_counted(images, counts), self.network)
            if shares.count() > 1:
                average_statistics(self.network, sum(counts), shares.group())

    def state_dict(self) -> dict[str, Any]:
        """The entries of a checkpoint: the averaged weights and how many were averaged; none before the first."""
        if not self.started:
            return {}
        return {"average": self.network.state_dict(), "averaged": self._averaged.n_averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if "average" in state:
            self.network.load_state_dict(state["average"])
            self._averaged.n_averaged.copy_(state["averaged"])


def _counted(images: Iterable[Tensor], counts: list[int]) -> Iterator[Tensor]:
    """The batches; ``counts`` gets the number of images of each that count."""
    for batch in images:
        share = shares.current()
        counts.append(0 if share is not None and share.idle else len(batch))
        yield batch
