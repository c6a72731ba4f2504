"""What holds for several problem files: every solver trains on them, modes as published, bfloat16."""

from __future__ import annotations

import copy
import importlib

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

NAMES = sorted(path.stem for path, _ in packaged_problems())


WITHOUT_DERIVATIVE = {"ssat"}  # whose δ* is no minimiser


def module_of(name):
    return importlib.import_module(f"bilevel_at.problems.{name}")


def every_problem(function):
    return pytest.mark.parametrize("name", NAMES)(function)


@pytest.mark.parametrize("solver", [ZeroIG, HessianFreeKKT, FullKKT])
@every_problem
def test_every_problem_in_python_with_every_solver(name, solver):
    module = module_of(name)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).train()
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    made = solver(damping=255 / 2) if name.endswith("beta") and solver is not ZeroIG else solver()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    problem = module.problem(epsilon=0.1)
    if name in WITHOUT_DERIVATIVE and solver is not ZeroIG:
        with pytest.raises(ba.InputError, match="without a derivative in θ, which .* needs; use ZeroIG"):
            made.backward(problem, model, ba.Batch(x, y, torch.arange(6)))
        return
    for epoch in range(2):
        problem.set_epoch(epoch, 2)
        optimizer.zero_grad()
        step = made.backward(problem, model, ba.Batch(x, y, torch.arange(6)))
        optimizer.step()
        assert step.loss.isfinite() and model.training
    assert {"digits", "cifar10"} <= module.recipe().keys()


def tiny():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    return model, ba.Batch(torch.rand(6, 1, 4, 4, dtype=F64), torch.arange(6) % 3, torch.arange(6))


@every_problem
def test_the_radius_of_every_problem_may_be_a_schedule(name):
    """As a run's ``--epsilon-warmup`` has it: everything that is a multiple of ε grows with it."""
    model, batch = tiny()
    growing = ba.Schedule(lambda step, steps: 0.2 * min(1.0, (step + 1) / (0.5 * steps)), by="step")
    problem = module_of(name).problem(epsilon=growing)
    problem.set_epoch(0, 10)
    for step, radius in ((0, 0.02), (4, 0.1), (10, 0.2)):
        problem.set_step(step, 20)
        solution = module_of(name).problem(epsilon=radius).lower.solve(model, batch, generator=seeded(1))
        grown = problem.lower.solve(model, batch, generator=seeded(1))
        assert problem.threat.radius == pytest.approx(radius)
        if name not in STEP_OF_ITS_OWN:
            torch.testing.assert_close(grown.delta, solution.delta)


# Chosen once, by the last ε: Fast-BAT's 1/λ, which is another below 8/255.
STEP_OF_ITS_OWN = ("fastbat", "remembered_fastbat")


@every_problem
def test_the_labels_of_every_problem_may_be_smoothed(name):
    model, batch = tiny()
    losses = {
        share: ZeroIG().hypergradient(
            module_of(name).problem(epsilon=0.1, label_smoothing=share), model, batch, generator=seeded(1)
        )
        for share in (0.0, 0.3)
    }
    assert not torch.equal(losses[0.0].losses, losses[0.3].losses)
    with pytest.raises(ba.InputError, match="label_smoothing is 1.5; it must be from 0 to 1"):
        module_of(name).problem(epsilon=0.1, label_smoothing=1.5)


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
