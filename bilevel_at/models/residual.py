"""Residual networks in their CIFAR form: a 3×3 stem, three halvings, global average pooling.

ResNet: He et al., "Deep residual learning" (2016). PreActResNet: He et al., "Identity mappings" (2016), without a batch
normalisation after the last block, as the adversarial training literature's code has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .activations import Activation

__all__ = ["preact_resnet", "resnet", "small_resnet"]


def conv3(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride, 1, bias=False)


def conv1(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 1, stride, bias=False)


def _convolutions(inside: int, width: int, stride: int, bottleneck: bool) -> list[nn.Conv2d]:
    if bottleneck:
        return [conv1(inside, width), conv3(width, width, stride), conv1(width, 4 * width)]
    return [conv3(inside, width, stride), conv3(width, width)]


class PostActBlock(nn.Module):
    """act(shortcut(x) + bn(conv(act(bn(conv(x))))))."""

    def __init__(self, inside: int, width: int, stride: int, bottleneck: bool, activation: Activation) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for conv in _convolutions(inside, width, stride, bottleneck):
            layers += [conv, nn.BatchNorm2d(conv.out_channels), activation()]
        self.residual = nn.Sequential(*layers[:-1])
        self.outside = outside = 4 * width if bottleneck else width
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(conv1(inside, outside, stride), nn.BatchNorm2d(outside))
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.residual(x) + self.shortcut(x))
        return out


class PreActBlock(nn.Module):
    """shortcut + conv(act(bn(conv(h)))) with h = act(bn(x)); the shortcut is x, or a projection of h."""

    def __init__(self, inside: int, width: int, stride: int, bottleneck: bool, activation: Activation) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inside), activation())
        layers: list[nn.Module] = []
        for conv in _convolutions(inside, width, stride, bottleneck):
            layers += [nn.BatchNorm2d(conv.in_channels), activation(), conv]
        self.residual = nn.Sequential(*layers[2:])
        self.outside = outside = 4 * width if bottleneck else width
        self.shortcut = conv1(inside, outside, stride) if stride != 1 or inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.residual(h) + (x if self.shortcut is None else self.shortcut(h))
        return out


Block = Callable[[int, int, int, bool, Activation], nn.Module]


def _stages(
    block: Block, depths: Sequence[int], bottleneck: bool, activation: Activation
) -> tuple[list[nn.Module], int]:
    stages: list[nn.Module] = []
    inside = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for i in range(depth):
            stages.append(block(inside, width, 2 if stage and i == 0 else 1, bottleneck, activation))
            inside = 4 * width if bottleneck else width
    return stages, inside


DEPTHS = {18: ([2, 2, 2, 2], False), 34: ([3, 4, 6, 3], False), 50: ([3, 4, 6, 3], True)}


def resnet(depth: int, shape: tuple[int, int, int], classes: int, activation: Activation = nn.ReLU) -> nn.Module:
    """ResNet-18, -34 or -50 for small images."""
    blocks, features = _stages(PostActBlock, *DEPTHS[depth], activation)
    stem = [conv3(shape[0], 64), nn.BatchNorm2d(64), activation()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes))


def preact_resnet(depth: int, shape: tuple[int, int, int], classes: int, activation: Activation = nn.ReLU) -> nn.Module:
    """PreActResNet-18, -34 or -50 for small images."""
    blocks, features = _stages(PreActBlock, *DEPTHS[depth], activation)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]
    return nn.Sequential(conv3(shape[0], 64), *blocks, *head)


def small_resnet(
    shape: tuple[int, int, int], classes: int, activation: Activation = nn.ReLU, width: int = 29
) -> nn.Module:
    """A PreActResNet of three blocks for two CPU cores, 253,000 parameters on CIFAR-10.

    Its first convolution has stride 2 on images of 16×16 or more, which costs a quarter: a forward pass of a 32×32
    image takes a fiftieth of a PreActResNet-18's operations.
    """
    return nn.Sequential(
        conv3(shape[0], width, 2 if min(shape[1:]) >= 16 else 1),
        PreActBlock(width, width, 1, False, activation),
        PreActBlock(width, 2 * width, 2, False, activation),
        PreActBlock(2 * width, 4 * width, 2, False, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )
