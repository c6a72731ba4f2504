"""QUB: the quadratic upper bound, around logits that are computed before the attack."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from plain_loops import (
    CLASSES,
    EPS,
    assert_same,
    batches,
    cross_entropy,
    descend,
    follow,
    grad,
    in_ball,
    in_range,
    network,
    noise,
    one_hot,
)
from transcriptions import ce, scenes, seeded

import bilevel_at as ba
from bilevel_at.problems import fastat, fastbat, minmax, qub
from bilevel_at.solvers import HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
@pytest.mark.parametrize("decreasing", [False, True])
def test_the_published_step(decreasing, smoothing):
    model, twin = network(), network()
    problem = qub.problem(EPS, decreasing=decreasing, label_smoothing=smoothing)
    problem.set_epoch(6, 20)
    follow(problem, model, 3)

    generator = torch.Generator().manual_seed(7)
    for batch in batches(3):
        x, targets = batch.x, one_hot(batch.y, 1 - smoothing + smoothing / CLASSES, smoothing / CLASSES)
        clean = twin(x)
        twin.eval()
        z = in_range(noise(x, EPS, generator), x).requires_grad_()
        delta = in_ball(z.detach() + 1.25 * EPS * grad(cross_entropy(twin(x + z), targets).sum(), z).sign(), x)
        twin.train()
        moved = twin(x + delta)
        h = moved - clean
        bound = cross_entropy(clean, targets) + ((clean.softmax(1) - targets) * h).sum(1) + (h**2).sum(1) / 4
        loss = 0.7 * bound + 0.3 * cross_entropy(moved, targets) if decreasing else bound
        descend(twin, loss.mean())
    assert_same(model, twin)


@examples(0.5)
@given(s=scenes(kinks=True), smoothing=st.sampled_from([0.0, 0.3, 1.0]))
def test_it_bounds_the_loss_from_above_and_touches_it_at_0(s, smoothing):
    problem = qub.problem(s.epsilon, label_smoothing=smoothing)
    with torch.no_grad():
        for p in s.model.parameters():
            p *= 3
    step = ZeroIG().hypergradient(problem, s.model, s.batch, generator=seeded(s.seed))
    loss = ba.CrossEntropy(smoothing)(s.model, s.batch, step.solution.delta)
    assert (step.losses >= loss - 1e-12).all()
    unmoved = qub.QuadraticBound().loss_at(
        s.model,
        qub.QuadraticBound().prepare(s.model, s.batch, None),
        ba.Solution(torch.zeros_like(s.x), torch.zeros_like(s.x), s.batch),
    )
    torch.testing.assert_close(unmoved, ce(s.model, s.x, s.y), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("of", "file"), [("fastat", fastat), ("minmax", minmax), ("fastbat", fastbat)])
def test_the_attacker_is_the_other_files(of, file):
    model, batch = network(), next(batches(1))
    ours = qub.problem(EPS, of=of, mode="train").lower.solve(model, batch, generator=seeded(1))
    theirs = file.problem(EPS).lower.solve(model, batch, generator=seeded(1))
    assert torch.equal(ours.delta, theirs.delta)
    assert type(qub.solver(EPS, of)) is type(file.solver())


def test_the_hypergradient_of_an_attacker_that_has_a_derivative():
    model, batch = network().eval(), next(batches(1))
    model[4].weight.data *= 20
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.4, None), "zero", "taylor", 0.3)
    problem = ba.BilevelProblem(qub.QuadraticBound(), lower)
    assert HessianFreeKKT().hypergradient(problem, model, batch).implicit_norm > 1e-3
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch, rtol=1e-6)


def test_a_file_that_is_not_there():
    with pytest.raises(ba.InputError, match=r"problem file fastbta does not exist; did you mean fastbat\?"):
        qub.problem(EPS, of="fastbta")


def test_the_bound_holds_under_autocast():
    """In bfloat16 the logits differ from float32's by 2^-9, and the logarithms of the bound would be rounded again."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, CLASSES)).float()
    model[1].weight.data *= 30
    x = torch.rand(64, 1, 4, 4)
    batch = ba.Batch(x, torch.arange(64) % CLASSES)
    delta = 0.01 * torch.randn(x.shape)
    upper = qub.QuadraticBound()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = ba.Solution(delta, torch.zeros_like(x), batch)
        bound = upper.loss_at(model, upper.prepare(model, batch, None), solution)
        loss = ba.cross_entropy(model, batch, delta)
    assert bound.dtype == torch.float32 and bool((bound - loss >= -1e-5).all())
