"""Several processes: 30 steps on two and four, with gradients reduced once a step, are those of one process."""

from __future__ import annotations

import pytest
import torch
from ranks import ONLY_LINUX, printed
from running import ROOT
from torch import nn

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.commands.plan import understand
from bilevel_at.commands.prepare import prepare
from bilevel_at.problems import fastat
from bilevel_at.solvers import ZeroIG

LOOP = '''
import torch
import torch.distributed as dist
from torch import nn

import bilevel_at as ba
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG

torch.set_num_threads(1)
torch.manual_seed(0)
x, y = torch.rand(30, 3, dtype=torch.float64), torch.randint(0, 3, (30,))
ball, attack = ba.LinfBall(0.3), ba.minus(ba.cross_entropy)


class FromMemory(ba.Anchor):
    """z is the last delta* of each example, from 0."""

    def __init__(self):
        self.memory = ba.SampleMemory()

    def draw(self, lower, model, batch, generator):
        return self.memory.read(batch, torch.zeros_like(batch.x)), None

    def observe(self, step):
        self.memory.write(step.solution.batch, step.solution.delta)


PROBLEMS = {
    "Fast-BAT": lambda: (ba.Linearized(attack, ball, ba.Steps("zero", "taylor"), "taylor", 0.5), HessianFreeKKT()),
    "remembered": lambda: (ba.Linearized(attack, ball, FromMemory(), "sign", 0.2), ZeroIG()),
    "Hessian-aware": lambda: (ba.Proximal(attack, ball, 5.0, "zero"), FullKKT()),
}


def train(name, mine):
    torch.manual_seed(1 + (dist.get_rank() if dist.is_initialized() else 0))  # apart, until they are given rank 0's
    model = nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 3)).double()
    ba.distributed.broadcast(model)
    lower, solver = PROBLEMS[name]()
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    opt = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
    for step in range(30):
        rows = torch.arange(30).roll(step)[: 10 + step % 7]
        rows = rows[mine(rows)]
        opt.zero_grad()
        if len(rows):
            solver.backward(problem, model, ba.Batch(x[rows], y[rows], rows, examples=30))
        ba.distributed.reduce_gradients(model, len(rows))
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


alone = {name: train(name, lambda rows: rows >= 0) for name in PROBLEMS}
dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()
for name in PROBLEMS:
    # By what remains of dividing, and unevenly: the last process has no example in some steps.
    owner = (torch.arange(30) ** 2 % 11).clamp(max=count - 1) if count > 2 else torch.arange(30) % 3 // 2
    together = train(name, lambda rows: owner[rows] == rank)
    gap = (together - alone[name]).abs().max().item()
    assert gap < 1e-10, (name, rank, gap)
    if rank == 0:
        print(f"{name}: {count} processes, {gap:.1e} from one", flush=True)
dist.destroy_process_group()
'''


@pytest.mark.slow
@ONLY_LINUX
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_are_one(tmp_path, count):
    results = printed(tmp_path, count, LOOP)
    assert results[0].count(f"{count} processes") == 3


class DistributedDataParallel(nn.Module):
    """By its name alone: torch's needs a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_wrapped_networks_are_refused():
    model = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    batch = ba.Batch(torch.rand(2, 4), torch.tensor([0, 1]))
    for action in (
        lambda: ZeroIG().hypergradient(fastat.problem(), model, batch),
        lambda: ba.distributed.reduce_gradients(model, 2),
    ):
        with pytest.raises(ba.InputError, match=r"DistributedDataParallel, whose hooks .* pass its \.module, and call"):
            action()


def test_one_process_reduces_nothing():
    model = nn.Linear(2, 2)
    ba.distributed.broadcast(model)
    ba.distributed.reduce_gradients(model, 3)
    assert model.weight.grad is None
    for examples in (-1, 2.0, True):
        with pytest.raises(ba.InputError, match=r"examples is .*; it must be a whole number, at least 0"):
            ba.distributed.reduce_gradients(model, examples)


def test_no_examples_at_all_and_sparse_gradients(monkeypatch):
    """Of two processes, the other one has none; 0 / 0 would be not a number."""
    monkeypatch.setattr(ba.distributed, "_processes", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    ba.distributed.reduce_gradients(model, 0)
    assert model.weight.grad.tolist() == [[0, 0]] and model.bias.grad.tolist() == [0]
    model = nn.Embedding(5, 2, sparse=True)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ba.InputError, match="the gradient of weight is sparse; it must be dense"):
        ba.distributed.reduce_gradients(model, 1)


def test_buckets_are_of_one_type_and_bounded(monkeypatch):
    monkeypatch.setattr(ba.distributed, "BUCKET", 100)
    sizes = [
        torch.zeros(n, dtype=t)
        for n, t in ((10, torch.float32), (10, torch.float64), (10, torch.float32), (40, torch.float32))
    ]
    buckets = list(ba.distributed._buckets(sizes))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[10, 10], [40], [10]]
    assert all(len({p.dtype for p in bucket}) == 1 for bucket in buckets)


def test_statistics_of_several_processes_are_not_compiled(monkeypatch):
    monkeypatch.setattr(shares, "_count", 2)
    plan = understand(["problems/fastat.py", "--sync-batch-norm", "--compile"])
    with pytest.raises(ba.InputError, match="--sync-batch-norm is not for --compile"):
        prepare(plan)


DROPPING = """

def model(shape, classes):
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, classes))
"""


def test_dropout_on_several_processes_is_not_compiled(monkeypatch, tmp_path):
    file = tmp_path / "dropping.py"
    file.write_text((ROOT / "problems/fastat.py").read_text() + DROPPING)
    monkeypatch.setattr(shares, "_count", 2)
    monkeypatch.setattr(shares, "first", lambda function: function())
    plan = understand([str(file), "--model", "file", "--compile", "--device", "cpu"])
    with pytest.raises(ba.InputError, match="--compile is not for networks with dropout on several processes"):
        prepare(plan)


def test_one_delta_for_a_batch_is_for_one_process(monkeypatch):
    class Shared(ba.AtAnchor):
        def base(self, model, batch):
            return batch.x[:1]

    problem = ba.BilevelProblem(ba.UpperProblem(), Shared(ba.LinfBall(0.1)))
    batch = ba.Batch(torch.rand(4, 3), torch.arange(4) % 3)
    ZeroIG().hypergradient(problem, nn.Linear(3, 3), batch)
    monkeypatch.setattr(shares, "_count", 2)
    with pytest.raises(ba.InputError, match="4 examples have 1 δ, which several processes would each have"):
        ZeroIG().hypergradient(problem, nn.Linear(3, 3), batch)
