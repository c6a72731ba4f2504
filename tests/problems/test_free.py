"""Free-AT: Algorithm 1 of Shafahi et al., its limits and its state."""

from __future__ import annotations

import copy

import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from transcriptions import F64, assert_same, ce, clip, descend, library_step, scenes, seeded

import bilevel_at as ba
from bilevel_at.problems import free, standard
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck


def free_pass(model, x, y, delta, step, epsilon, lr):
    """One replay of Algorithm 1: both gradients from the same pass, then both players move; returns the new δ."""
    used = clip(delta, x, epsilon)  # x + δ is an image when the network sees it
    at = (x + used).requires_grad_()
    loss = ce(model, at, y).mean()
    *gradients, towards = torch.autograd.grad(loss, [*model.parameters(), at])
    descend(model, gradients, lr)
    return (delta + step * towards.sign()).clamp(-epsilon, epsilon)


@examples(0.3)
@given(s=scenes(kinks=True), replays=st.integers(1, 3), factor=st.floats(0.3, 1.2), carry=st.booleans())
def test_free_at(s, replays, factor, carry):
    """Algorithm 1 of Shafahi et al. over three batches, the last one short."""
    step = factor * s.epsilon
    problem = free.problem(s.epsilon, step, restart_every=0 if carry else replays)
    g, n = seeded(s.seed), len(s.x)
    delta = torch.zeros_like(s.x)
    for rows in (n, n, max(1, n - 1)):
        x = torch.rand((rows, *s.x.shape[1:]), generator=g, dtype=F64)
        y = torch.randint(0, s.classes, (rows,), generator=g)
        if not carry:
            delta = torch.zeros_like(s.x)
        for _ in range(replays):
            used = clip(delta[:rows], x, s.epsilon)
            taken = library_step(problem, free.solver(), s.model, ba.Batch(x, y), s.lr)
            torch.testing.assert_close(taken.solution.delta, used, rtol=1e-12, atol=1e-14)
            delta[:rows] = free_pass(s.twin, x, y, delta[:rows].clone(), step, s.epsilon, s.lr)
            assert_same(s.model, s.twin)
    if carry:
        torch.testing.assert_close(problem.lower.anchor.memory.values, delta, rtol=1e-12, atol=1e-14)


@examples(0.3)
@given(s=scenes(kinks=True))
def test_free_at_once_without_carrying_is_standard_training(s):
    ours, theirs = free.problem(s.epsilon, restart_every=1), standard.problem(s.epsilon)
    for _ in range(3):
        library_step(ours, free.solver(), s.model, s.batch, s.lr)
        library_step(theirs, standard.solver(), s.twin, s.batch, s.lr)
        assert all(torch.equal(p, q) for p, q in zip(s.model.parameters(), s.twin.parameters(), strict=True))


@examples(0.3)
@given(s=scenes(), before=st.integers(0, 3), carry=st.booleans())
def test_free_at_continues_from_its_state(s, before, carry):
    restart_every = 0 if carry else 2
    first = free.problem(s.epsilon, restart_every=restart_every)
    for _ in range(before):
        library_step(first, free.solver(), s.model, s.batch, s.lr)
    second = free.problem(s.epsilon, restart_every=restart_every)
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(first.state_dict())
    twin = copy.deepcopy(s.model)
    for _ in range(3):
        a = library_step(first, free.solver(), s.model, s.batch, s.lr)
        b = library_step(second, free.solver(), twin, s.batch, s.lr)
        assert torch.equal(a.solution.delta, b.solution.delta)
        assert all(torch.equal(p, q) for p, q in zip(s.model.parameters(), twin.parameters(), strict=True))
    again = free.problem(s.epsilon, restart_every=restart_every)
    again.load_state_dict(state)  # the two runs above did not write into the state they were given
    assert again.lower.anchor.passes == before


def test_free_at_passes_the_check():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()
    batch = ba.Batch(torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    problem = free.problem(epsilon=0.1)
    ZeroIG().backward(problem, model, batch)  # so that something is carried
    assert problem.lower.solve(model, batch).delta.any()
    for solver in (ZeroIG(), HessianFreeKKT(), FullKKT()):
        assert hypergradcheck(problem, solver, model, batch)
