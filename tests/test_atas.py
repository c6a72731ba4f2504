"""ATAS against a direct transcription of its Algorithm 1; perturbations through crop and flip; state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.problems import atas, atta
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG
from bilevel_at.testing import strategies as bst

F64 = torch.float64


def input_gradient(model, x, y):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


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
                gradient = input_gradient(model, adversarial[i][None], y[i : i + 1])[0]
                v[i] = beta * v[i] + (1 - beta) * gradient.norm() ** 2
                alpha = 2 * epsilon * c / (c + v[i].sqrt())
                moved = adversarial[i] + alpha * gradient.sign()
                adversarial[i] = moved.clamp(min=x[i] - epsilon).clamp(max=x[i] + epsilon).clamp(0, 1)
                torch.testing.assert_close(x[i] + step.solution.delta[k], adversarial[i], atol=1e-12, rtol=0)
            optimizer.step()
    torch.testing.assert_close(lower.step.memory.values[:n], v)


def test_published_constants():
    lower = atas.problem(epsilon=8 / 255).lower
    step = lower.step
    assert step.gamma / step.c == pytest.approx(16 / 255) and step.c == pytest.approx(0.01 * 128) and step.beta == 0.5
    assert (step.low, step.high) == (pytest.approx(4 / 255), pytest.approx(14 / 255))
    assert lower.mode == "eval" and lower.anchor.reset_every == 10
    gradient = torch.full((2, 3), 1e-9)
    batch = ba.Batch(torch.rand(2, 3), torch.zeros(2).long(), torch.arange(2))
    lower.set_epoch(0, 30)
    assert lower.step.size(batch, gradient, remember=False) == pytest.approx(8 / 255)  # warm-up
    lower.set_epoch(5, 30)
    assert lower.step.size(batch, gradient, remember=False).tolist() == pytest.approx([14 / 255] * 2)  # clipped from 16
    assert lower.step.size(batch, 1e9 * gradient * 1e9, remember=False).tolist() == pytest.approx([4 / 255] * 2)


def test_constant_step_is_atta():
    """ATAS whose steps are clipped to one length is ATTA with that step, visit by visit."""
    model, batch = small()
    mine = ba.Adaptive(1.0, 1.0, low=0.05, high=0.05)
    lowers = [atta.problem(epsilon=0.1, step=0.05).lower, atas.problem(epsilon=0.1).lower]
    lowers[1].step = mine
    for visit in range(3):
        deltas = [lower.solve(model, batch, generator=torch.Generator().manual_seed(visit)).delta for lower in lowers]
        assert torch.equal(*deltas) and (deltas[0] != 0).any()


# --- views --------------------------------------------------------------------------------------------------------


@st.composite
def views(draw, n, padding):
    g = torch.Generator().manual_seed(draw(bst.seeds))
    return ba.CropFlip.draw(n, padding, g, torch.device("cpu"))


@given(data=st.data(), n=st.integers(1, 4), padding=st.integers(0, 3), h=st.integers(1, 5), w=st.integers(1, 5))
def test_views_read_what_they_wrote(data, n, padding, h, w):
    canvas = torch.randn(n, 2, h + 2 * padding, w + 2 * padding)
    window = torch.randn(n, 2, h, w)
    view = data.draw(views(n, padding))
    written = view.write(canvas, window)
    assert torch.equal(view.apply(written), window)
    for i in range(n):  # and nothing outside the window moved
        top, left = view.top[i], view.left[i]
        outside = torch.ones_like(canvas[i], dtype=torch.bool)
        outside[:, top : top + h, left : left + w] = False
        assert torch.equal(written[i][outside], canvas[i][outside])
        expected = canvas[i, :, top : top + h, left : left + w]
        assert torch.equal(view.apply(canvas)[i], expected.flip(-1) if view.flip[i] else expected)


@given(data=st.data(), n=st.integers(1, 3), padding=st.integers(0, 3))
def test_perturbations_follow_their_image_exactly(data, n, padding):
    """Image and perturbation go through the same views: x + δ of a second view is that view of the first x + δ."""
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.3, bounds=None), ba.Remembered(), "sign", step=0.1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    images = torch.rand(n, 1, 4, 4)
    index, y = torch.arange(n), torch.zeros(n).long()
    first, second = data.draw(views(n, padding)), data.draw(views(n, padding))
    batch = ba.Batch(first.apply(first.pad(images)), y, index, first)
    delta = lower.solve(model, batch).delta
    assert torch.equal(lower.draw_anchor(model, batch, None), delta)
    canvas = lower.anchor.memory.values[index]
    again = ba.Batch(second.apply(second.pad(images)), y, index, second)
    assert torch.equal(lower.draw_anchor(model, again, None), second.apply(canvas))
    assert torch.equal(first.apply(canvas), delta)


def test_perturbations_are_projected_where_the_crop_shows_other_pixels():
    lower = atas.problem(epsilon=0.2).lower
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    images, index, y = torch.rand(4, 1, 4, 4), torch.arange(4), torch.zeros(4).long()
    for seed in range(5):
        view = ba.CropFlip.draw(4, 2, torch.Generator().manual_seed(seed), torch.device("cpu"))
        batch = ba.Batch(view.apply(view.pad(images)), y, index, view)
        delta = lower.solve(model, batch).delta
        assert (delta.abs() <= 0.2).all() and (batch.x + delta >= 0).all() and (batch.x + delta <= 1).all()


# --- state ----------------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 3))
    return model, ba.Batch(torch.rand(4, 6), torch.tensor([0, 1, 2, 0]), torch.tensor([7, 1, 5, 2]))


def test_state_survives_saving():
    model, batch = small()
    one, two = atas.problem(epsilon=0.1), atas.problem(epsilon=0.1)
    one.set_epoch(6, 30)
    ZeroIG().hypergradient(one, model, batch)
    two.load_state_dict(one.state_dict())
    a, b = (ZeroIG().hypergradient(p, model, batch).solution for p in (one, two))
    assert torch.equal(a.delta, b.delta) and torch.equal(a.step, b.step)


def test_holding_the_anchor_remembers_nothing():
    model, batch = small()
    problem = atas.problem(epsilon=0.1)
    ZeroIG().hypergradient(problem, model, batch)
    before = (problem.lower.anchor.memory.values.clone(), problem.lower.step.memory.values.clone())
    for solver in (ZeroIG(), HessianFreeKKT(), FullKKT()):
        solver.hypergradient(problem, model, batch, anchor=torch.zeros_like(batch.x))
    assert torch.equal(problem.lower.anchor.memory.values, before[0])
    assert torch.equal(problem.lower.step.memory.values, before[1])


def test_perturbations_are_redrawn_on_schedule():
    model, batch = small()
    problem = atas.problem(epsilon=0.1, reset_every=3)
    ZeroIG().hypergradient(problem, model, batch)
    emptied = []
    for epoch in range(10):
        problem.lower.anchor.memory.known = torch.ones(8, dtype=torch.bool)
        problem.set_epoch(epoch, 10)
        emptied.append(problem.lower.anchor.memory.known is None)
    assert [e for e, gone in enumerate(emptied) if gone] == [2, 5, 8]  # as the third, sixth and ninth of ten begin


def test_memory_grows_and_needs_an_index():
    model, batch = small()
    problem = atas.problem()
    ZeroIG().hypergradient(problem, model, batch)
    more = ba.Batch(batch.x, batch.y, torch.tensor([50, 7, 51, 0]))
    kept = problem.lower.anchor.memory.values[7].clone()
    ZeroIG().hypergradient(problem, model, more, anchor=None)
    assert len(problem.lower.anchor.memory.values) >= 52
    assert not torch.equal(problem.lower.anchor.memory.values[7], kept)
    with pytest.raises(ba.InputError, match=r"pass Batch\(x, y, index=...\)"):
        ZeroIG().hypergradient(problem, model, ba.Batch(batch.x, batch.y))
