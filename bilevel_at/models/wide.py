"""Wide residual networks (Zagoruyko and Komodakis, 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from .activations import Activation
from .residual import conv1, conv3

__all__ = ["wide_resnet"]


class WideBlock(nn.Module):
    """Two 3×3 convolutions, each after batch normalisation and activation, with dropout between them."""

    def __init__(self, inside: int, width: int, stride: int, dropout: float, activation: Activation) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inside), activation())
        self.residual = nn.Sequential(
            conv3(inside, width, stride),
            nn.BatchNorm2d(width),
            activation(),
            nn.Dropout(dropout),
            conv3(width, width),
        )
        self.shortcut = conv1(inside, width, stride) if inside != width else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.residual(h) + (x if self.shortcut is None else self.shortcut(h))
        return out


def wide_resnet(
    depth: int,
    widen: int,
    shape: tuple[int, int, int],
    classes: int,
    activation: Activation = nn.ReLU,
    dropout: float = 0.0,
) -> nn.Module:
    """WRN-depth-widen for small images; depth is 6n + 4. dropout: between the convolutions of a block."""
    inside, layers = 16, [conv3(shape[0], 16)]
    blocks: list[nn.Module] = [*layers]
    for stage in range(3):
        width = 16 * widen * 2**stage
        for i in range((depth - 4) // 6):
            blocks.append(WideBlock(inside, width, 2 if stage and i == 0 else 1, dropout, activation))
            inside = width
    head = [nn.BatchNorm2d(inside), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes)]
    return nn.Sequential(*blocks, *head)
