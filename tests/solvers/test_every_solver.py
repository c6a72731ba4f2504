"""Every solver with every problem file: it trains, or says in one line why it does not."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import torch
from torch import nn

import bilevel_at as ba
from bilevel_at.runs.problem_file import packaged_problems
from bilevel_at.solvers import SOLVERS, HessianFreeKKT, Lazy

NAMES = sorted(path.stem for path, _ in packaged_problems())
# With weights of 0.1·λ, as published; a longer 1/λ would leave no coordinate free.
ARGUMENTS = {name: {"step": 0.3} for name in ("fastbat", "sgd_bca")} | {"remembered_fastbat": {"max_step": 0.3}}


def network(batch_norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    if batch_norm:
        layers.insert(1, nn.BatchNorm2d(4))
    return nn.Sequential(*layers).train()


def solver_of(module, solver, arguments):
    """As the command line makes it: the problem file's, if it knows the name."""
    if solver == "lazy":
        return Lazy(HessianFreeKKT(damping=1.0), 0.5)
    factory = getattr(module, "solver", None)
    takes = inspect.signature(factory).parameters if factory else {}
    if "name" not in takes:
        return SOLVERS[solver]()
    return factory(name=solver, **{k: v for k, v in arguments.items() if k in takes})


# What a solver may refuse, whatever the problem; anything else has to train.
DERIVATIVE = "finds a δ\\* without a derivative"
REFUSALS = {
    "hessian-free-kkt": f"{DERIVATIVE}|has no proximal term",
    "full-kkt": f"{DERIVATIVE}|not positive definite",
    "projection-adjoint": f"{DERIVATIVE}|has no proximal term",
    "neumann": f"{DERIVATIVE}|has no proximal term",
    "value-function": f"{DERIVATIVE}|is not a minimiser of its objective|was not minimised to tol",
    "gauss-newton-kkt": f"{DERIVATIVE}|plus or minus ba.CrossEntropy|samples that share nothing|not positive definite",
    "lazy": DERIVATIVE,
}
FASTBAT = {"fastbat", "remembered_fastbat"}


@pytest.mark.parametrize("batch_norm", [False, True], ids=["independent", "batch-norm"])
@pytest.mark.parametrize("solver", [*SOLVERS, "lazy"])
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_or_says_why_not(name, solver, batch_norm):
    module = importlib.import_module(f"bilevel_at.problems.{name}")
    arguments = {"epsilon": 0.1, **ARGUMENTS.get(name, {})}
    problem, model = module.problem(**arguments), network(batch_norm)
    made = solver_of(module, solver, arguments)
    batch = ba.Batch(torch.rand(6, 1, 4, 4), torch.arange(6) % 3, torch.arange(6))
    generator = torch.Generator().manual_seed(0)
    try:
        for epoch in range(2):
            problem.set_epoch(epoch, 2)
            step = made.backward(problem, model, batch, generator)
    except (ba.InputError, ba.BilevelError) as error:
        line = str(error)
        assert "\n" not in line and len(line) < 400
        assert re.search(REFUSALS[solver], line), line
        assert name not in FASTBAT or (solver == "gauss-newton-kkt" and batch_norm)
        return
    assert step.loss.isfinite() and step.grads.keys() == dict(model.named_parameters()).keys()
    assert all(g is None or g.isfinite().all() for g in step.grads.values())
    if name in FASTBAT and solver not in ("zero-ig", "lazy"):
        assert step.implicit_norm > 1e-3 * step.direct_norm
