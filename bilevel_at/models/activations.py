"""The activations the papers compare (Fast-BAT paper, Table 6): ReLU, Softplus, Swish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

__all__ = ["ACTIVATIONS", "Activation", "ActivationName"]

Activation = Callable[[], nn.Module]
ActivationName = Literal["relu", "softplus", "swish"]

ACTIVATIONS: dict[str, Activation] = {"relu": nn.ReLU, "softplus": nn.Softplus, "swish": nn.SiLU}
