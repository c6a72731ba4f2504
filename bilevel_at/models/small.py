"""Small networks for small images."""

from __future__ import annotations

from torch import nn

from .activations import Activation

__all__ = ["one_layer_cnn", "small_cnn"]


def small_cnn(shape: tuple[int, int, int], classes: int, activation: Activation = nn.ReLU) -> nn.Module:
    """Two 3×3 convolutions (32 and 64 channels, the second of stride 2), a hidden layer of 128; for small images.

    Images larger than the 8×8 digits are averaged to the same 4×4 before the hidden layer.
    """
    return nn.Sequential(
        nn.Conv2d(shape[0], 32, 3, padding=1),
        activation(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        activation(),
        nn.Identity() if shape[1:] == (8, 8) else nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        activation(),
        nn.Linear(128, classes),
    )


def one_layer_cnn(
    shape: tuple[int, int, int], classes: int, activation: Activation = nn.ReLU, filters: int = 4
) -> nn.Module:
    """One 3×3 convolution and a linear layer: the network in which GradAlign (Andriushchenko and Flammarion, 2020,
    section 4) finds the filter that causes catastrophic overfitting."""
    return nn.Sequential(
        nn.Conv2d(shape[0], filters, 3, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(filters * shape[1] * shape[2], classes),
    )
