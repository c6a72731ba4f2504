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


def test_a_table_is_reserved_as_a_whole_where_the_number_of_examples_is_known():
    model, batch = small()
    problem = atas.problem()
    known = batch.replace(examples=9)
    assert known[1:].examples == known.repeat(2).examples == known.to("cpu").examples == 9
    ZeroIG().backward(problem, model, known)
    memory = problem.lower.anchor.memory
    assert memory.values.shape == (9, 6) and memory.known.nonzero().flatten().tolist() == [1, 2, 5, 7]
    with pytest.raises(ba.InputError, match="index has values up to 7; with examples=7 they must be below that"):
        ZeroIG().backward(problem, model, batch.replace(examples=7))
    with pytest.raises(ba.InputError, match="examples is 0"):
        batch.replace(examples=0)


def test_rows_of_classes_are_reserved_too():
    """BETA's perturbations are of an example and a class."""
    model, batch = small()
    lower = ba.Targeted(ba.LinfBall(0.1), steps=2, anchor="remembered")
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    for known in (None, 8):
        ZeroIG().backward(problem, model, batch.replace(examples=known))
    assert problem.lower.anchor.memory.values.shape == (24, 6)


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
