"""Memories by example: they grow, need an index, and are untouched where the anchor is given."""

from __future__ import annotations

import pytest
import torch
from networks import small

import bilevel_at as ba
from bilevel_at.problems import atas
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG


def test_memory_grows_and_needs_an_index():
    model, batch = small()
    problem = atas.problem()
    ZeroIG().backward(problem, model, batch)
    more = ba.Batch(batch.x, batch.y, torch.tensor([50, 7, 51, 0]))
    before = problem.lower.anchor.memory.values[7].clone()
    ZeroIG().backward(problem, model, more)
    assert len(problem.lower.anchor.memory.values) >= 52
    assert not torch.equal(problem.lower.anchor.memory.values[7], before)
    with pytest.raises(ba.InputError, match=r"pass Batch\(x, y, index=...\)"):
        ZeroIG().hypergradient(problem, model, ba.Batch(batch.x, batch.y))


def test_holding_the_anchor_remembers_nothing():
    model, batch = small()
    problem = atas.problem(epsilon=0.1)
    problem.set_epoch(6, 30)  # past the warm-up
    ZeroIG().backward(problem, model, batch)
    before = (problem.lower.anchor.memory.values.clone(), problem.lower.step.memory.values.clone())
    for solver in (ZeroIG(), HessianFreeKKT(), FullKKT()):
        solver.hypergradient(problem, model, batch, anchor=torch.zeros_like(batch.x))
    assert torch.equal(problem.lower.anchor.memory.values, before[0])
    assert torch.equal(problem.lower.step.memory.values, before[1])
