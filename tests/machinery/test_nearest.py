"""The attack on the nearest classes."""

from __future__ import annotations

import pytest
import torch
from evaluating import EPS, FEW, TEST, linear, trained
from torch import nn

from bilevel_at.batch import Batch
from bilevel_at.errors import InputError
from bilevel_at.evaluate import attack_from_name, ball, robust_correct
from bilevel_at.evaluate.nearest import Nearest, nearest_classes


class Counted(nn.Module):
    """A network that counts the images of its backward passes."""

    def __init__(self, network):
        super().__init__()
        self.network, self.gradients = network, 0

    def forward(self, x):
        if x.requires_grad:
            x = x * 1
            x.register_hook(self.count)
        return self.network(x)

    def count(self, gradient):
        self.gradients += len(gradient)


@pytest.mark.parametrize(("direction", "order"), [("sign", 1), ("normalized", 2)])
def test_classes_are_ranked_by_margin_over_gradient(direction, order):
    """A linear network, whose distances are exact: |f_y - f_t| / ||w_y - w_t||."""
    model = trained(linear, "standard", 8)
    x, y, w = FEW.pixels(), FEW.y, model[1].weight
    got = nearest_classes(model, Batch(x, y), 3, 9, direction)
    logits = model(x)
    for i in range(len(x)):
        distance = [
            ((logits[i, y[i]] - logits[i, t]) / (w[y[i]] - w[t]).norm(order)).item() if t != y[i] else torch.inf
            for t in range(10)
        ]
        assert got[i].tolist() == sorted(range(10), key=distance.__getitem__)[:3]


def test_images_that_stand_cost_what_the_docstring_says_and_broken_ones_less(robust):
    space, steps, classes = ball("linf", EPS), 6, 2
    correct = robust_correct(robust, FEW, attack_from_name("clean", space))
    images = FEW[correct.nonzero().flatten()]
    counted = Counted(robust).eval()
    stand = robust_correct(counted, images, attack_from_name(f"nearest-{steps}-{classes}", space))
    full = steps * (classes + 1) + 3 * classes
    assert 0 < stand.sum() < len(images)
    assert stand.sum() * full < counted.gradients < len(images) * full
    counted.gradients = 0
    still = images[stand.nonzero().flatten()]
    tiny = robust_correct(counted, still, attack_from_name(f"nearest-{steps}-{classes}", ball("linf", 1e-6)))
    assert tiny.all() and counted.gradients == len(still) * full


def test_it_finds_what_pgd_and_beta_find(robust):
    few = TEST[slice(0, 120)]
    ours, pgd, beta = (
        robust_correct(robust, few, attack_from_name(name, EPS)).sum()
        for name in ("nearest-40-3-2", "pgd-50-5", "beta-30")
    )
    assert ours <= min(pgd, beta) + 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacked_images_are_in_the_set(convolutional, norm):
    space = ball(norm, EPS)
    batch = Batch(FEW.pixels(), FEW.y)
    moved = Nearest(space, 5, 3, EPS)(convolutional, batch, torch.Generator().manual_seed(0))
    delta = moved - batch.x
    assert torch.allclose(space.project(delta, batch.x), delta, atol=1e-6) and delta.abs().max() > 0


def test_names():
    assert len(attack_from_name("nearest-40-3-2", EPS).stages) == 2
    for name in ("nearest", "nearest-40", "nearest-0-3", "nearest-4-0"):
        with pytest.raises(InputError, match="not known"):
            attack_from_name(name, EPS)
