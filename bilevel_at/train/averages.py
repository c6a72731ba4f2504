"""The exponential moving average of a network's weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["WeightAverage"]


class WeightAverage:
    """θ̄ ← decay · θ̄ + (1 − decay) · θ after every update, batch statistics alike; the first update copies θ.

    model: whose weights are averaged.
    decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @property
    def network(self) -> nn.Module:
        """The network with the averaged weights."""
        return self._averaged.module

    def update(self, model: nn.Module) -> None:
        """Include the weights after an update in the average."""
        self._averaged.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """The entries of a checkpoint: the averaged weights, and the number of updates."""
        return {"average": self.network.state_dict(), "averaged": self._averaged.n_averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError where the checkpoint has no average."""
        self.network.load_state_dict(state["average"])
        self._averaged.n_averaged.copy_(state["averaged"])
