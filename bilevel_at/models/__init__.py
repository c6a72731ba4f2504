"""Networks by name. Every one takes images in [0, 1] and normalises them itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import ImageSet
from ..errors import InputError
from .activations import ACTIVATIONS, ActivationName
from .from_timm import PREFIX, timm_network
from .imagenet import imagenet_resnet
from .residual import preact_resnet, resnet, small_resnet
from .small import one_layer_cnn, small_cnn
from .wide import wide_resnet

__all__ = [
    "BEYOND",
    "MODELS",
    "TRAINED",
    "ActivationName",
    "Architecture",
    "Normalized",
    "build_model",
    "libraries_of",
]

TRAINED = {"digits-fastbat": Path(__file__).parent / "trained" / "digits-fastbat.safetensors"}
"""Trained networks in the package, by name: ``ba.load("digits-fastbat")``. ``benchmarks/shipped.py`` makes them."""

STATISTICS_FROM = 2_000  # images; more change the third digit at most


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
    """A network by name.

    build: called as ``build(shape, classes, activation=…)``, and ``dropout=…`` where ``drops``.
    scale: whether inputs are divided by the channel's standard deviation, or only centred.
    """

    build: Callable[..., nn.Module]
    about: str
    scale: bool = True
    drops: bool = False


MODELS = {
    "small_cnn": Architecture(small_cnn, "two convolutions and a hidden layer, for digits and 28×28", scale=False),
    "one_layer_cnn": Architecture(one_layer_cnn, "one convolution of four filters (GradAlign's analysis)", scale=False),
    "small_resnet": Architecture(small_resnet, "a PreActResNet of three blocks, for CIFAR on a CPU"),
    **{
        f"preact_resnet{depth}": Architecture(partial(preact_resnet, depth), f"PreActResNet-{depth}, CIFAR form")
        for depth in (18, 34, 50)
    },
    **{f"resnet{depth}": Architecture(partial(resnet, depth), f"ResNet-{depth}, CIFAR form") for depth in (18, 34, 50)},
    **{
        f"wide_resnet{depth}_{widen}": Architecture(
            partial(wide_resnet, depth, widen), f"WideResNet-{depth}-{widen}, CIFAR form", drops=True
        )
        for depth, widen in ((16, 8), (28, 10), (34, 10))
    },
    **{
        f"imagenet_resnet{depth}": Architecture(
            partial(imagenet_resnet, depth), f"torchvision's ResNet-{depth}, for images of 224×224"
        )
        for depth in (18, 34, 50)
    },
}

BEYOND = {f"{PREFIX}NAME": f"a network of timm, untrained (pip install timm): {PREFIX}resnet18"}
"""Names of networks that other libraries have."""


def libraries_of(name: str) -> list[str]:
    """The distributions, besides those that this library requires, that the network ``name`` comes from."""
    return ["timm"] if name.startswith(PREFIX) else []


def _architecture(name: str) -> Architecture:
    if name.startswith(PREFIX):
        return Architecture(partial(timm_network, name.removeprefix(PREFIX)), "a network of timm")
    if name not in MODELS:
        raise InputError(f"model {name!r} is not known; choose from {', '.join([*MODELS, *BEYOND])}")
    return MODELS[name]


def build_model(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    train: ImageSet | None = None,
    activation: ActivationName = "relu",
    dropout: float = 0.0,
) -> nn.Module:
    """The network ``name`` for images of ``shape`` (C, H, W), normalised by ``train``'s channel statistics.

    Without ``train`` the statistics are 0 and 1, to be overwritten by a checkpoint. Raises :class:`InputError` for an
    unknown name, for dropout in a network that has no place for it, and where timm is needed and not installed.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"activation {activation!r} is not known; choose from {', '.join(ACTIVATIONS)}")
    architecture = _architecture(name)
    mean, std = torch.zeros(shape[0]), torch.ones(shape[0])
    if train is not None:
        pixels = train.sample(STATISTICS_FROM).pixels()
        mean = pixels.mean((0, 2, 3))
        std = pixels.std((0, 2, 3)).clamp(min=1e-3) if architecture.scale else std
    options: dict[str, object] = {"activation": ACTIVATIONS[activation]}
    if dropout and not architecture.drops:
        raise InputError(f"model {name} has no dropout; the wide residual networks do")
    if dropout:
        options["dropout"] = dropout
    return Normalized(architecture.build(shape, classes, **options), mean, std)
