"""Attacks against closed forms: linear networks, whose robust accuracy is known, and what holds for every network."""

from __future__ import annotations

import pytest
import torch
from evaluating import QUIET
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import fast
from torch import nn

import bilevel_at as ba
from bilevel_at.data import Images
from bilevel_at.evaluate import attack_from_name, ball, evaluate
from bilevel_at.evaluate.robust import attacked
from bilevel_at.testing import strategies as bst


def linear(classes, norm, n=80, seed=0):
    """A linear network, images whose range never binds, a radius, and whether each withstands the best attack of it."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, classes)).eval().requires_grad_(False)
    model[1].weight.copy_(torch.randn(model[1].weight.shape, generator=g))
    model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    x = 0.2 + 0.6 * torch.rand((4 * n, 1, 6, 6), generator=g)
    out = model(x)
    y = out.argmax(1)
    gaps = out.gather(1, y[:, None]) - out
    normals = model[1].weight[y][:, None] - model[1].weight[None]
    length = normals.abs().sum(2) if norm == "linf" else normals.norm(dim=2)
    margin = (gaps / length).scatter(1, y[:, None], torch.inf).amin(1)
    radius = margin.median().item()
    kept = ((margin - radius).abs() > 1e-3).nonzero().flatten()[:n]
    assert radius < 0.2 and 0.3 < (margin[kept] > radius).float().mean() < 0.7
    return model, Images(x[kept], y[kept], classes), radius, margin[kept] > radius


UNTARGETED = ["fgsm", "pgd-50-1", "pgd-30-3-any", "apgd-ce", "fab", "beta-30"]


TARGETED = ["beta-30", "beta-30-top2", "apgd-t", "fab-t", "autoattack", "autoattack-plus"]
QUICK = [(2, "fgsm"), (2, "pgd-50-1"), (2, "apgd-ce"), (2, "fab"), (5, "beta-30"), (5, "beta-30-top2"), (5, "fab-t")]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("classes", "name"), fast([(2, n) for n in UNTARGETED] + [(5, n) for n in TARGETED], QUICK))
def test_a_linear_network_is_attacked_to_the_exact_accuracy(norm, classes, name):
    model, images, radius, stands = linear(classes, norm, n=40 if "auto" in name else 80)
    trace = attacked(model, images, attack_from_name(name, ball(norm, radius)))
    assert (trace.correct != stands).sum() == 0 and trace.outside == 0


def test_pgd_with_few_steps_on_a_linear_network():
    """In l∞ ten steps of ε/4 reach the corner from anywhere; in l2 the start is not quite forgotten."""
    for norm, most in (("linf", 0), ("l2", 2)):
        model, images, radius, stands = linear(2, norm)
        found = attacked(model, images, attack_from_name("pgd-10-3-any", ball(norm, radius))).correct
        assert (found | ~stands).all() and (found != stands).sum() <= most


@pytest.mark.slow
def test_square_on_a_linear_network():
    """It breaks nothing that cannot be broken, and not all that can: it never changes the last row and column, say."""
    for norm in ("linf", "l2"):
        model, images, radius, stands = linear(5, norm)
        found = attacked(model, images, attack_from_name("square", ball(norm, radius))).correct
        assert (found | ~stands).all() and (~found).sum() > 0.3 * (~stands).sum()


@settings(max_examples=25)
@given(seed=bst.seeds, low=st.floats(0.001, 0.1), more=st.floats(0.001, 0.1), norm=st.sampled_from(["linf", "l2"]))
def test_accuracy_falls_with_the_radius(seed, low, more, norm):
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)).eval()
    x = torch.rand((30, 6), generator=g)
    with torch.no_grad():
        y = model(x).argmax(1)
    result = evaluate(model, (x, y), ["clean", "pgd-20-1"], [low, low + more], norm=norm, **QUIET)
    clean, small, large = (score.accuracy for score in result.values())
    assert 1 == clean >= small >= large
    if norm == "linf":  # clipping leaves the best corner the best corner
        at_once = evaluate(model, (x, y), ["fgsm"], low, **QUIET)["fgsm"].accuracy
        assert at_once == small


@settings(max_examples=40)
@given(
    name=st.sampled_from(["fgsm", "pgd-3-2", "pgd-3-2-any", "beta-3", "beta-2-2-top1", "apgd-ce", "fab-t"]),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.one_of(st.just(0.0), st.floats(1e-4, 3.0)),
    seed=bst.seeds,
)
def test_attacked_images_lie_in_the_ball_and_in_the_range(name, norm, eps, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand((4, 1, 2, 3), generator=g).mul(1.4).sub(0.2).clamp(0, 1)
    y = torch.randint(0, 4, (4,), generator=g)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).eval()
    attack = attack_from_name(name, ball(norm, eps))
    found = attack.perturb(model, ba.Batch(x, y), g)
    delta = (found - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert found.shape == x.shape and size.max() <= eps + 1e-6 * max(1, eps)
    assert found.min() >= 0 and found.max() <= 1
    assert attacked(model, Images(x, y, 4), attack).outside == 0
