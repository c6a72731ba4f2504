"""ATAS against a transcription of its Algorithm 1; its constants; its state."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from networks import F64, small
from transcriptions import by_sample, ce_gradient, clip, library_step, play, seeded, visits

import bilevel_at as ba
from bilevel_at.problems import atas, atta
from bilevel_at.solvers import ZeroIG
from bilevel_at.testing import strategies as bst


@pytest.mark.parametrize("follow", [False, True])
@examples(0.3)
@given(
    v=visits(), c=st.floats(0.05, 3.0), momentum=st.floats(0.0, 0.9), top=st.floats(0.6, 4.0), warm=st.integers(0, 2)
)
def test_atas(follow, v, c, momentum, top, warm):
    """Algorithm 1 with what the published code adds: a constant step ε at first, and steps in a range.

    v begins after the warm-up, or with ``follow`` follows its gradients too.
    """

    def update(memory, batch, epoch):
        z = memory.start(batch)
        gradient = ce_gradient(v.twin, batch.x + z, batch.y)
        if follow or epoch >= warm:
            memory.follow(batch.index, gradient, momentum)
        followed = memory.v[batch.index]
        alpha = top * v.epsilon * c / (c + followed.sqrt())
        alpha = torch.full_like(alpha, v.epsilon) if epoch < warm else alpha.clamp(v.epsilon / 2, 7 * v.epsilon / 4)
        delta = clip(z + by_sample(alpha, z) * gradient.sign(), batch.x, v.epsilon)
        memory.store(batch, delta)
        return delta

    clipped = {"shortest": v.epsilon / 2, "longest": 7 * v.epsilon / 4, "warmup_epochs": warm}
    following = {"follow_warmup": True} if follow else {}
    problem = atas.problem(v.epsilon, top * v.epsilon, c, momentum, **clipped, **following)
    memory = play(v, problem, atas.solver(), update)
    torch.testing.assert_close(problem.lower.step.memory.values[: len(v.x)], memory.v, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("how", ["warm-up", "low = high"])
@examples(0.3)
@given(v=visits(n=4))
def test_atas_with_a_constant_step_is_atta(how, v):
    if how == "warm-up":
        length, ours = v.epsilon, atas.problem(v.epsilon, warmup_epochs=30)
    else:
        length = 0.7 * v.epsilon
        steps = ba.Adaptive(gamma=1.0, c=0.5, low=length, high=length)
        loss, ball = ba.minus(ba.cross_entropy), ba.LinfBall(v.epsilon)
        lower = ba.Linearized(loss, ball, ba.Remembered(), "sign", steps)
        ours = ba.BilevelProblem(ba.UpperProblem(), lower)
    theirs = atta.problem(v.epsilon, length)
    draws = seeded(v.seed), seeded(v.seed)
    for epoch, index in v.epochs(3):
        ours.set_epoch(epoch, 30), theirs.set_epoch(epoch, 30)
        a = library_step(ours, atas.solver(), v.model, v.batch(index), v.lr, draws[0])
        b = library_step(theirs, atta.solver(), v.twin, v.batch(index), v.lr, draws[1])
        assert torch.equal(a.solution.delta, b.solution.delta)
        assert all(torch.equal(p, q) for p, q in zip(v.model.parameters(), v.twin.parameters(), strict=True))


@examples(0.3)
@given(data=st.data(), epsilon=st.floats(0.02, 0.3), c=st.floats(0.05, 2.0), beta=st.floats(0.0, 0.9))
def test_recursion_is_algorithm_1(data, epsilon, c, beta):
    """x_i^j for three epochs over six examples in changing order, with the network updated in between."""
    shape, classes = data.draw(bst.shapes(8)), data.draw(st.integers(2, 4))
    model = data.draw(bst.smooth_models(shape, classes))
    g = torch.Generator().manual_seed(data.draw(bst.seeds))
    n = 6
    x, y = torch.rand((n, *shape), generator=g, dtype=F64), torch.randint(0, classes, (n,), generator=g)
    # the published clip and warm-up are not part of Algorithm 1
    lower = ba.Linearized(
        ba.minus(ba.cross_entropy),
        ba.LinfBall(epsilon),
        ba.Remembered(),
        "sign",
        ba.Adaptive(gamma=2 * epsilon * c, c=c, beta=beta),
    )
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    v = torch.zeros(n, dtype=F64)
    adversarial = [None] * n
    draws = torch.Generator().manual_seed(9)
    for _ in range(3):
        for index in torch.randperm(n, generator=g).split(2):
            batch = ba.Batch(x[index], y[index], index)
            mark = draws.get_state()
            optimizer.zero_grad()
            step = ZeroIG().backward(problem, model, batch, generator=draws)
            fresh = torch.Generator()
            fresh.set_state(mark)
            start = ba.LinfBall(epsilon, bounds=None).sample(batch.x, fresh)
            for k, i in enumerate(index.tolist()):
                if adversarial[i] is None:
                    adversarial[i] = x[i] + start[k].clamp(-x[i], 1 - x[i])
                gradient = ce_gradient(model, adversarial[i][None], y[i : i + 1])[0]
                v[i] = beta * v[i] + (1 - beta) * gradient.norm() ** 2
                alpha = 2 * epsilon * c / (c + v[i].sqrt())
                moved = adversarial[i] + alpha * gradient.sign()
                adversarial[i] = moved.clamp(min=x[i] - epsilon).clamp(max=x[i] + epsilon).clamp(0, 1)
                torch.testing.assert_close(x[i] + step.solution.delta[k], adversarial[i], atol=1e-12, rtol=0)
            optimizer.step()
    torch.testing.assert_close(lower.step.memory.values[:n], v)


@pytest.mark.parametrize("level", [8, 4])
def test_published_constants(level):
    """The range of the steps is the same at every ε; the warm-up's step is ε."""
    problem = atas.problem(epsilon=level / 255)
    lower = problem.lower
    step = lower.step
    assert step.gamma / step.c == pytest.approx(16 / 255) and step.c == pytest.approx(0.01 * 128) and step.beta == 0.5
    assert (step.low, step.high) == (pytest.approx(4 / 255), pytest.approx(14 / 255))
    assert lower.mode == "eval" and lower.anchor.reset_every == 10
    gradient = torch.full((2, 3), 1e-9)
    batch = ba.Batch(torch.rand(2, 3), torch.zeros(2).long(), torch.arange(2))
    problem.set_epoch(0, 30)
    assert lower.step.size(batch, gradient) == pytest.approx(level / 255)  # warm-up
    problem.set_epoch(5, 30)
    assert lower.step.size(batch, gradient).tolist() == pytest.approx([14 / 255] * 2)  # clipped from 16
    assert lower.step.size(batch, 1e9 * gradient * 1e9).tolist() == pytest.approx([4 / 255] * 2)


def test_constant_step_is_atta():
    """ATAS whose steps are clipped to one length is ATTA with that step, visit by visit."""
    model, batch = small()
    mine = ba.Adaptive(1.0, 1.0, low=0.05, high=0.05)
    problems = [atta.problem(epsilon=0.1, step=0.05), atas.problem(epsilon=0.1)]
    problems[1].lower.step = mine
    last = None
    for visit in range(3):
        a, b = (ZeroIG().backward(p, model, batch, generator=seeded(visit)).solution for p in problems)
        assert torch.equal(a.delta, b.delta) and (a.delta != 0).any()
        assert last is None or torch.equal(b.anchor, last)
        last = b.delta


def test_perturbations_are_projected_where_the_crop_shows_other_pixels():
    problem = atas.problem(epsilon=0.2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    images, index, y = torch.rand(4, 1, 4, 4), torch.arange(4), torch.zeros(4).long()
    for seed in range(5):
        view = ba.CropFlip.draw(4, 2, torch.Generator().manual_seed(seed), torch.device("cpu"))
        batch = ba.Batch(view.apply(view.pad(images)), y, index, view)
        delta = ZeroIG().backward(problem, model, batch).solution.delta
        assert (delta.abs() <= 0.2).all() and (batch.x + delta >= 0).all() and (batch.x + delta <= 1).all()


def test_state_survives_saving():
    model, batch = small()
    one, two = atas.problem(epsilon=0.1), atas.problem(epsilon=0.1)
    one.set_epoch(6, 30)
    ZeroIG().backward(one, model, batch)
    two.set_epoch(6, 30)
    two.load_state_dict(one.state_dict())
    a, b = (ZeroIG().hypergradient(p, model, batch).solution for p in (one, two))
    assert torch.equal(a.delta, b.delta) and torch.equal(a.lam, b.lam) and len(a.lam) == len(batch)
