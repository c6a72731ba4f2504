"""torchvision's residual networks, which begin with two halvings and suit images of 224×224."""

from __future__ import annotations

from torch import nn

from ..errors import InputError
from .activations import Activation, replace_relu

__all__ = ["imagenet_resnet"]


def imagenet_resnet(
    depth: int, shape: tuple[int, int, int], classes: int, activation: Activation = nn.ReLU
) -> nn.Module:
    """torchvision's ResNet-18, -34 or -50, untrained. Raises :class:`InputError` unless images have three channels."""
    if shape[0] != 3:
        raise InputError(f"imagenet_resnet{depth} takes images of 3 channels; these have {shape[0]}")
    import torchvision  # here: it takes as long to import as torch

    network: nn.Module = getattr(torchvision.models, f"resnet{depth}")(num_classes=classes)
    if activation is not nn.ReLU:
        replace_relu(network, activation)
    return network
