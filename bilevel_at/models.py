"""Networks by name. Every one takes images in [0, 1] and normalises them itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .data import Images
from .errors import InputError

__all__ = ["MODELS", "Architecture", "Normalized", "build_model", "small_cnn"]


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


def small_cnn(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Two 3×3 convolutions (32 and 64 channels, the second of stride 2), a hidden layer of 128; for small images.

    Images larger than the 8×8 digits are averaged to the same 4×4 before the hidden layer.
    """
    return nn.Sequential(
        nn.Conv2d(shape[0], 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Identity() if shape[1:] == (8, 8) else nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


@dataclass(frozen=True)
class Architecture:
    """A network by name. scale: whether inputs are divided by the channel's standard deviation, or only centred."""

    build: Callable[[tuple[int, int, int], int], nn.Module]
    about: str
    scale: bool = True


MODELS = {
    "small_cnn": Architecture(small_cnn, "two convolutions and a hidden layer, for digits and 28×28", scale=False),
}


def build_model(name: str, shape: tuple[int, int, int], classes: int, train: Images | None = None) -> nn.Module:
    """The network ``name`` for images of ``shape`` (C, H, W), normalised by ``train``'s channel statistics.

    Without ``train`` the statistics are 0 and 1, to be overwritten by a checkpoint. Raises :class:`InputError` for an
    unknown name.
    """
    if name not in MODELS:
        raise InputError(f"model {name!r} is not known; choose from {', '.join(MODELS)}")
    architecture = MODELS[name]
    mean, std = torch.zeros(shape[0]), torch.ones(shape[0])
    if train is not None:
        pixels = train[slice(0, 10_000)].pixels()
        mean = pixels.mean((0, 2, 3))
        std = pixels.std((0, 2, 3)).clamp(min=1e-3) if architecture.scale else std
    return Normalized(architecture.build(shape, classes), mean, std)
