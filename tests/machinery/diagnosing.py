"""Small networks, images and histories for the tests of diagnostics and figures."""

from __future__ import annotations

import torch
from torch import nn

from bilevel_at import diagnose
from bilevel_at.data import Images

SHAPE = (1, 6, 6)


def images(n=24, classes=3, seed=0, shape=SHAPE):
    g = torch.Generator().manual_seed(seed)
    return Images(torch.rand(n, *shape, generator=g), torch.randint(0, classes, (n,), generator=g), classes)


def cnn(classes=3, seed=0, width=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.Tanh(),
        nn.BatchNorm2d(width),
        nn.Flatten(),
        nn.Linear(width * 36, classes),
    )


def linear(classes=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, classes))


def history(epochs=6, n=50, classes=5):
    g = torch.Generator().manual_seed(0)
    label = torch.arange(n) % classes
    norm = torch.linspace(1, 2, n)[torch.randperm(n, generator=g)] * (1 + 0.1 * torch.rand(epochs, n, generator=g))
    filters = torch.randn(epochs + 1, 4, 1, 3, 3, generator=g)
    return diagnose.History(norm, 0.1 / norm, label, filters)


def line(epoch, robust, clean=0.9):
    return {"epoch": epoch, "robust": robust, "clean": clean}
