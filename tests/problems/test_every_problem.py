"""What holds for several problem files: every solver trains on them, modes as published, bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transcriptions import (
    F64,
    FIRST,
    assert_same,
    box,
    ce,
    descend_on,
    library_step,
    relative_error,
    seeded,
    sign_step,
    small_convolutional,
    under_autocast,
)

import bilevel_at as ba
from bilevel_at.problems import atta, fastat, fgsm, minmax, standard
from bilevel_at.runs.problem_file import packaged_problems
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG


@pytest.mark.parametrize("solver", [ZeroIG, HessianFreeKKT, FullKKT])
@pytest.mark.parametrize("name", sorted(path.stem for path, _ in packaged_problems()))
def test_every_problem_in_python_with_every_solver(name, solver):
    import importlib

    module = importlib.import_module(f"bilevel_at.problems.{name}")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).train()
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    made = solver(damping=255 / 2) if name.endswith("beta") and solver is not ZeroIG else solver()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    problem = module.problem(epsilon=0.1)
    for epoch in range(2):
        problem.set_epoch(epoch, 2)
        optimizer.zero_grad()
        step = made.backward(problem, model, ba.Batch(x, y, torch.arange(6)))
        optimizer.step()
        assert step.loss.isfinite() and model.training
    assert {"digits", "cifar10"} <= module.recipe().keys()


@pytest.mark.parametrize(("file", "mode"), [(fastat, "train"), (atta, "eval")], ids=["fastat", "atta"])
def test_attack_passes_see_batch_statistics_as_published(file, mode):
    """Fast-AT attacks in train mode, which moves the running statistics too; ATTA in eval mode, which does not."""
    torch.manual_seed(5)
    layers = [torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 3)]
    model = torch.nn.Sequential(*layers).double()
    model[1].running_mean.normal_()
    twin = copy.deepcopy(model)
    batch = ba.Batch(torch.rand(7, 6, dtype=F64), torch.randint(0, 3, (7,)), torch.arange(7))
    step = library_step(file.problem(0.1), file.solver(), model, batch, 0.5, seeded(1))
    assert model.training
    twin.train(mode == "train")
    length = {"train": 0.125, "eval": 4 / 255}[mode]
    delta = sign_step(twin, batch.x, batch.y, step.solution.anchor, length, 0.1)
    torch.testing.assert_close(step.solution.delta, delta)
    twin.train()
    descend_on(twin, ce(twin, batch.x + delta, batch.y).mean(), 0.5)
    assert_same(model, twin)
    for got, want in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("file", [standard, fastat, fgsm, minmax])
def test_bfloat16_upper_gradients(file):
    """At the same δ*: near a zero gradient a sign is a coin, so δ* itself is compared in no precision but its own."""
    worst = 0.0
    for seed in range(5):
        model, batch = small_convolutional(seed)
        exact = copy.deepcopy(model).double()
        problem = file.problem(0.1)
        step = under_autocast(problem, file.solver(), model, batch)
        x, delta = batch.x.double(), step.solution.delta.double()
        low, high = box(x, 0.1)
        assert ((delta >= low - 1e-6) & (delta <= high + 1e-6)).all()
        batch = ba.Batch(x, batch.y)
        loss = problem.upper.loss_at(exact, batch, ba.Solution(delta, delta, batch)).mean()
        worst = max(worst, relative_error(model, torch.autograd.grad(loss, list(exact.parameters()))))
    print(f"bfloat16, {file.__name__}: {worst:.4f} (bound {FIRST:.4f})")
    assert worst <= FIRST
