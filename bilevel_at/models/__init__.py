"""Networks by name. Every one takes images in [0, 1] and normalises them itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..data import Images
from ..errors import InputError
from .activations import ACTIVATIONS, ActivationName
from .residual import preact_resnet, resnet
from .small import small_cnn
from .wide import wide_resnet

__all__ = ["MODELS", "ActivationName", "Architecture", "Normalized", "build_model"]


class Normalized(nn.Module):
    """network((x − mean) / std), the constants per channel and saved with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean.reshape(-1, 1, 1))
        self.register_buffer("std", std.reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network((x - self.mean) / self.std)
        return out


@dataclass(frozen=True)
class Architecture:
    """A network by name. scale: whether inputs are divided by the channel's standard deviation, or only centred."""

    build: Callable[..., nn.Module]
    about: str
    scale: bool = True


MODELS = {
    "small_cnn": Architecture(small_cnn, "two convolutions and a hidden layer, for digits and 28×28", scale=False),
    **{
        f"preact_resnet{depth}": Architecture(partial(preact_resnet, depth), f"PreActResNet-{depth}, CIFAR form")
        for depth in (18, 34, 50)
    },
    **{f"resnet{depth}": Architecture(partial(resnet, depth), f"ResNet-{depth}, CIFAR form") for depth in (18, 34, 50)},
    **{
        f"wide_resnet{depth}_{widen}": Architecture(partial(wide_resnet, depth, widen), f"WideResNet-{depth}-{widen}")
        for depth, widen in ((16, 8), (28, 10), (34, 10))
    },
}


def build_model(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    train: Images | None = None,
    activation: ActivationName = "relu",
) -> nn.Module:
    """The network ``name`` for images of ``shape`` (C, H, W), normalised by ``train``'s channel statistics.

    Without ``train`` the statistics are 0 and 1, to be overwritten by a checkpoint. Raises :class:`InputError` for an
    unknown name.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"activation {activation!r} is not known; choose from {', '.join(ACTIVATIONS)}")
    if name not in MODELS:
        raise InputError(f"model {name!r} is not known; choose from {', '.join(MODELS)}")
    architecture = MODELS[name]
    mean, std = torch.zeros(shape[0]), torch.ones(shape[0])
    if train is not None:
        pixels = train[slice(0, 10_000)].pixels()
        mean = pixels.mean((0, 2, 3))
        std = pixels.std((0, 2, 3)).clamp(min=1e-3) if architecture.scale else std
    return Normalized(architecture.build(shape, classes, activation=ACTIVATIONS[activation]), mean, std)
