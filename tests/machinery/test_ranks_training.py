"""Every method on two and four processes is what it is on one: weights, what is remembered, records, in float64.

Networks are without batch statistics, and with those of the whole batch.
"""

from __future__ import annotations

import pytest
from marks import thorough
from ranks import ONLY_LINUX, printed
from running import PROBLEMS

PROGRAM = """
import dataclasses
import sys
import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.data import Images
from bilevel_at.evaluate import Attack
from bilevel_at.runs.problem_file import ProblemFile
from bilevel_at.solvers import ZeroIG
from bilevel_at.train import Trainer

EPOCHS = 2
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
g = torch.Generator().manual_seed(0)
# 43 in batches of 8: of the last one, of 3, a fourth process has none; by example, more have none now and then.
images = Images(torch.rand(43, 1, 8, 8, generator=g), torch.randint(0, 4, (43,), generator=g), 4)


def network(normalised):
    torch.manual_seed(3)
    # A bias before a normalisation has no gradient but rounding, of which Sub-AT would make a principal component.
    bias = not normalised
    first, second = nn.Conv2d(1, 6, 3, padding=1, bias=bias), nn.Conv2d(6, 6, 3, stride=2, bias=bias)
    between = [[nn.BatchNorm2d(6)] * normalised + [nn.Softplus()] for _ in range(2)]
    model = nn.Sequential(first, *between[0], second, *between[1], nn.Flatten(), nn.Linear(54, 4)).double()
    ba.distributed.synchronise(model)
    return model


def trained(name, normalised=False, compiled=False, **settings):
    file = ProblemFile(name)
    recipe = file.recipe("digits")
    recipe = dataclasses.replace(recipe, epochs=EPOCHS, batch_size=8, lr=0.2, augment="crop-flip", **settings)
    solver = ZeroIG() if file.solver is None else file.solver()
    problem = file.problem(**recipe.problem)
    if compiled:
        solver.compile("eager")
    return Trainer(problem, solver, network(normalised), images, images[slice(0, 6)], recipe, Attack("clean"))


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def leaves(value):
    if isinstance(value, torch.Tensor):
        yield value.double()
    elif isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)


def end(trainer):
    epochs = [epoch for epoch in trainer.epochs()]
    state = trainer.state_dict()
    kept = [*leaves(state["problem"]), *leaves(state["solver"]), *leaves(state["optimizer"])]
    records = [torch.tensor([e.loss, e.clean, e.train, e.perturbation]) for e in epochs]
    history = [torch.from_numpy(a).double().nan_to_num(-1) for a in trainer.recorder.arrays().values()]
    return [weights(trainer), *kept], records + history


def apart(one, other):
    assert len(one) == len(other), (len(one), len(other))
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True) if a.numel())


SETTINGS = [name.partition(":") for name in sys.argv[1:]]
CHANGES = {"": {}, "accumulate": {"accumulate": 2}, "statistics": {"normalised": True}, "compiled": {"compiled": True}}
SETTINGS = [(name, CHANGES[more]) for name, _, more in SETTINGS]
dist.init_process_group("gloo")
for name, more in SETTINGS:
    with ba.distributed.together():
        trainer = trained(name, **more)
        before = weights(trainer)
        its_state, its_records = end(trainer)
        count = shares.count()
    if dist.get_rank() == 0:
        state, records = end(trained(name, **more))  # alone
        moved = float((its_state[0] - before).abs().max())
        gaps = apart(state, its_state), apart(records, its_records)
        assert moved > 1e-2, (name, moved)
        assert gaps[0] < 1e-10 and gaps[1] < 1e-6, (name, gaps)  # records are float32
        print(f"{name} {more or ''}: {count} processes, {gaps[0]:.1e} from one", flush=True)
dist.barrier()
dist.destroy_process_group()
"""

FEW = ["fastbat", "atas", "free", "nuat", "awp", "fastbat:accumulate", "fastbat:statistics"]
ALL = [f"{name}{more}" for name in PROBLEMS for more in ("", ":statistics")]
REST = [name for name in ALL if name not in FEW] + ["fastbat:compiled", "atas:compiled"]


def check(tmp_path, count, names):
    results = printed(tmp_path, count, PROGRAM, *names)
    assert results[0].count(f"{count} processes") == len(names)


@ONLY_LINUX
@pytest.mark.parametrize("count", [2, 4])
def test_some_methods_are_the_same_on_any_number_of_processes(tmp_path, count):
    check(tmp_path, count, FEW)


@ONLY_LINUX
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_every_method_is_the_same_on_any_number_of_processes(tmp_path, count):
    if count > 2 and not thorough():
        pytest.skip("two processes here; more of them with --hypothesis-profile thorough")
    check(tmp_path, count, REST)
