"""No step of training waits for the device: every one runs on torch's meta device, where a look at a value raises."""

from __future__ import annotations

import importlib

import pytest
import torch
from marks import fast
from running import PROBLEMS

import bilevel_at as ba
from bilevel_at.data import Images
from bilevel_at.evaluate import Attack
from bilevel_at.models import build_model
from bilevel_at.problems import subat
from bilevel_at.runs.recipe import Recipe
from bilevel_at.solvers import HessianFreeKKT, Lazy, ZeroIG
from bilevel_at.train import Trainer

META = torch.device("meta")


def on_meta(name, solver=None, **options):
    """A trainer of three batches of images that have no values."""
    module = importlib.import_module(f"bilevel_at.problems.{name}")
    problem = module.problem(**options)
    if solver is None:
        solver = module.solver() if hasattr(module, "solver") else ZeroIG()
    model = build_model("small_resnet", (3, 32, 32), 10).to(META)
    images = Images(torch.empty(24, 3, 32, 32, dtype=torch.uint8, device=META), torch.empty(24, device=META).long(), 10)
    recipe = Recipe(epochs=2, batch_size=8, augment="crop-flip", replays=2 if name == "free" else 1)
    return Trainer(problem, solver, model, images, images, recipe, Attack("clean"))


@pytest.mark.parametrize("name", fast(PROBLEMS, ["atas", "fastbat", "free", "ssat"]))
def test_no_problem_waits(name, monkeypatch):
    if name == "subat":  # whose snapshots, one in 200 steps, go to the CPU
        monkeypatch.setattr(subat, "_flat", lambda model: torch.rand(sum(p.numel() for p in model.parameters())))
    trainer = on_meta(name)
    for epoch in range(2):
        means, looks = trainer.train_batches(epoch)
        assert means.is_meta and looks.is_meta


@pytest.mark.parametrize(
    "solver",
    [ZeroIG(), HessianFreeKKT(cross_at="solution"), HessianFreeKKT(cross_at="merged"), Lazy(HessianFreeKKT(), 0.5)],
    ids=str,
)
def test_no_solver_of_the_linearised_attacker_waits(solver):
    on_meta("fastbat", solver, mode="train").train_batches(0)


@pytest.mark.parametrize("kind", [ba.LinfBall, ba.L2Ball])
def test_no_ball_waits(kind):
    """Projection, sampling and the active set, in the input range."""
    lower = ba.Linearized(ba.minus(ba.cross_entropy), kind(0.5, (0, 1)), "uniform", "taylor", 1.0)
    model = build_model("small_resnet", (3, 32, 32), 10).to(META)
    batch = ba.Batch(torch.empty(4, 3, 32, 32, device=META), torch.empty(4, device=META).long())
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    HessianFreeKKT().backward(problem, model, batch, torch.Generator())


def test_a_look_would_raise():
    """The test would notice: a loss that looks at itself."""
    look = ba.UpperProblem(lambda model, batch, delta: ba.cross_entropy(model, batch, delta) / float(batch.x.max()))
    trainer = on_meta("fastat")
    trainer.problem.upper = look
    with pytest.raises(RuntimeError, match="meta"):
        trainer.train_batches(0)
