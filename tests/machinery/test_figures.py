"""Figures are drawn, and files."""

from __future__ import annotations

import math

import pytest
import torch
from diagnosing import history, images, linear
from torch import nn

import bilevel_at as ba
from bilevel_at import diagnose
from bilevel_at.figures import diagnosis as drawn
from bilevel_at.figures import landscape as pictured

pytestmark = pytest.mark.usefixtures("drawn")


def is_picture(path, least=10_000):
    data = path.read_bytes()
    return data[:4] == b"\x89PNG" and len(data) > least


def test_figures_of_attacks(tmp_path):
    data, model = images(classes=2), linear()
    norms = [diagnose.random_step_norm(model, data, 0.2, bounds=bounds, draws=2) for bounds in (None, (0, 1))]
    drawn.random_step(norms, tmp_path / "norms.png")
    with pytest.raises(ba.InputError, match="all at one epsilon"):
        drawn.random_step([norms[0], diagnose.random_step_norm(model, data, 0.1)], tmp_path / "none.png")
    delta = ba.LinfBall(0.2).project(0.2 * torch.randn_like(data.x).sign(), data.x)
    sizes = diagnose.perturbation_sizes(delta, ba.LinfBall(0.2), data.x)
    drawn.perturbations(sizes, tmp_path / "sizes.png", "corners")
    plain = diagnose.perturbation_sizes(torch.full((3, 4), 0.1), ba.L2Ball(0.2))
    drawn.perturbations(plain, tmp_path / "plain.png")
    found = diagnose.loss_landscape(model, data.x[:3], data.y[:3], 0.4, points=9)
    pictured.landscapes(found, tmp_path / "landscapes.png", epsilon=0.2)
    colour = diagnose.loss_landscape(
        nn.Sequential(nn.Flatten(), nn.Linear(75, 3)), torch.rand(3, 5, 5), 1, 0.1, points=5
    )
    pictured.landscapes(colour, tmp_path / "one.png")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    nn.init.zeros_(flat[1].weight)
    pictured.landscapes(diagnose.loss_landscape(flat, data.x[0], 0, 0.1, points=5), tmp_path / "flat.png")
    files = sorted(tmp_path.glob("*.png"))
    assert len(files) == 6 and all(is_picture(file) for file in files)


def test_figures_of_training(tmp_path):
    kept = history()
    drawn.gradient_norms(kept, tmp_path / "norms.png")
    steady = diagnose.History(kept.gradient_norm, torch.full_like(kept.step, math.nan), kept.label)
    drawn.gradient_norms(steady, tmp_path / "steady.png")
    pictured.filters(kept.filters, tmp_path / "filters.png")
    pictured.filters(torch.randn(3, 12, 3, 5, 5), tmp_path / "many.png")
    with pytest.raises(ba.InputError, match="before and after"):
        pictured.filters(kept.filters[:1], tmp_path / "none.png")
    lines = [{"epoch": e, "implicit_ratio": 0.01 * e, "implicit_cosine": -0.2} for e in range(4)]
    drawn.coupling(lines, tmp_path / "coupling.png")
    with pytest.raises(ba.InputError, match="no implicit term"):
        drawn.coupling([{"epoch": 1, "implicit_ratio": 0.0, "implicit_cosine": 0.0}], tmp_path / "none.png")
    with pytest.raises(ba.InputError, match="no implicit_cosine"):
        drawn.coupling([{"epoch": 1, "implicit_ratio": 0.1}], tmp_path / "none.png")
    files = sorted(tmp_path.glob("*.png"))
    assert len(files) == 5 and all(is_picture(file) for file in files)
