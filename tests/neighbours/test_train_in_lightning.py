"""Lightning's loop gives the weights that a bare loop gives."""

from __future__ import annotations

import pytest
import torch

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.models import build_model
from bilevel_at.problems import fastbat
from bilevel_at.solvers import HessianFreeKKT

pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")


@pytest.mark.filterwarnings("ignore")  # Lightning's advice: workers, logging
def test_the_weights_are_those_of_a_bare_loop(example):
    found = example("train_in_lightning")
    assert found["accuracy"] > 0.9
    torch.manual_seed(0)
    train, _ = load_data("digits")
    model = build_model("small_cnn", train.shape, train.classes, train)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    problem, solver, generator = fastbat.problem(0.1, step=1.0), HessianFreeKKT(), torch.Generator().manual_seed(0)
    for _ in range(4):
        for rows in torch.arange(len(train)).split(64):
            optimizer.zero_grad()
            solver.backward(problem, model, ba.Batch(train.x[rows], train.y[rows]), generator)
            optimizer.step()
    for a, b in zip(model.parameters(), found["module"].network.parameters(), strict=True):
        torch.testing.assert_close(a, b)
