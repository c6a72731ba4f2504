"""The activations the papers compare (Fast-BAT paper, Table 6): ReLU, Softplus, Swish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

__all__ = ["ACTIVATIONS", "Activation", "ActivationName", "kinks", "replace_relu"]

Activation = Callable[[], nn.Module]
ActivationName = Literal["relu", "softplus", "swish"]
"""Activations by name, as ``--activation`` has them."""

KINKED = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Threshold,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool2d,
)

ACTIVATIONS: dict[str, Activation] = {"relu": nn.ReLU, "softplus": nn.Softplus, "swish": nn.SiLU}


def kinks(model: nn.Module) -> list[str]:
    """The kinds of modules whose derivative jumps, by name; functions (``F.relu``) are not seen."""
    return list(dict.fromkeys(type(module).__name__ for module in model.modules() if isinstance(module, KINKED)))


def replace_relu(network: nn.Module, activation: Activation) -> int:
    """Put an activation in the place of every ``nn.ReLU``; how many there were. Functions (``F.relu``) stay."""
    places = [
        (module, name)
        for module in network.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ReLU)
    ]
    for module, name in places:
        setattr(module, name, activation())
    return len(places)
