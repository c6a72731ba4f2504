"""Anchors: corners, what is remembered, and when it is drawn again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import F64, Quadratic, batch_of, dense, small, views
from transcriptions import ce_gradient, seeded

import bilevel_at as ba
from bilevel_at.problems import atas, fgsm
from bilevel_at.solvers import ZeroIG


def test_a_named_policy_on_the_class_keeps_its_state():
    class Remembering(Quadratic):
        anchor = "remembered"

    one, two = (ba.BilevelProblem(ba.UpperProblem(), Remembering()) for _ in range(2))
    batch = batch_of(3, 6).replace(index=torch.arange(3))
    delta = ZeroIG().backward(one, dense(6, 5, 3), batch).solution.delta
    assert not torch.equal(two.lower.solve(dense(6, 5, 3), batch).anchor, delta)  # each object has its own
    two.load_state_dict(one.state_dict())
    for problem in (one, two):
        assert torch.equal(problem.lower.solve(dense(6, 5, 3), batch).anchor, delta)
    one.lower.anchor = ba.Zero()  # and may be changed afterwards
    assert (one.lower.solve(dense(6, 5, 3), batch).anchor == 0).all()


def test_random_corners_are_fair():
    x = torch.full((1, 4000), 0.5, dtype=F64)
    model = torch.nn.Linear(4000, 2).double()
    lower = fgsm.problem(0.1, "corner").lower
    z = lower.solve(model, ba.Batch(x, torch.tensor([0])), generator=seeded(3)).anchor
    assert abs((z > 0).double().mean().item() - 0.5) < 0.04  # five standard deviations


@given(data=st.data(), n=st.integers(1, 3), padding=st.integers(0, 3))
def test_perturbations_follow_their_image_exactly(data, n, padding):
    """Image and perturbation go through the same views: x + δ of a second view is that view of the first x + δ."""
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.3, bounds=None), ba.Remembered(), "sign", step=0.1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    images = torch.rand(n, 1, 4, 4)
    index, y = torch.arange(n), torch.zeros(n).long()
    first, second = data.draw(views(n, padding)), data.draw(views(n, padding))
    batch = ba.Batch(first.apply(first.pad(images)), y, index, first)
    delta = ZeroIG().backward(ba.BilevelProblem(ba.UpperProblem(), lower), model, batch).solution.delta
    assert torch.equal(lower.solve(model, batch).anchor, delta)
    canvas = lower.anchor.memory.values[index]
    again = ba.Batch(second.apply(second.pad(images)), y, index, second)
    assert torch.equal(lower.solve(model, again).anchor, second.apply(canvas))
    assert torch.equal(first.apply(canvas), delta)


def test_perturbations_are_redrawn_on_schedule():
    model, batch = small()
    problem = atas.problem(epsilon=0.1, reset_every=3)
    ZeroIG().backward(problem, model, batch)
    emptied = []
    for epoch in range(10):
        problem.lower.anchor.memory.known = torch.ones(8, dtype=torch.bool)
        problem.set_epoch(epoch, 10)
        emptied.append(problem.lower.anchor.memory.known is None)
    assert [e for e, gone in enumerate(emptied) if gone] == [2, 5, 8]  # as the third, sixth and ninth of ten begin


@pytest.mark.parametrize(("epochs", "expected"), [(9, [2, 5]), (10, [2, 5, 8]), (3, [])])
def test_nothing_is_redrawn_in_the_last_epoch(epochs, expected):
    """A network that trains for one more epoch on fresh perturbations would end on weak ones (ATAS' published code)."""
    anchor = ba.Remembered(reset_every=3)
    batch = batch_of(4, 6)
    batch = ba.Batch(batch.x, batch.y, torch.arange(4))
    cleared = []
    for epoch in range(epochs):
        anchor.memory.write(batch, batch.x)
        anchor.set_epoch(epoch, epochs)
        if torch.equal(anchor.memory.read(batch, torch.zeros_like(batch.x)), torch.zeros_like(batch.x)):
            cleared.append(epoch)
    assert cleared == expected


CUBES = pytest.mark.parametrize("start", [ba.Uniform, ba.Corner])


@CUBES
@pytest.mark.parametrize(
    "constraint", [ba.LinfBall(0.1), ba.L2Ball(0.1, (0, 1)), ba.Range()], ids=["box", "l2", "range"]
)
def test_starts_with_a_radius_are_drawn_in_the_cube_and_clipped_to_the_input_range(start, constraint):
    """Whatever the constraint, that the draw may leave; where x is near a bound, mass lies on the bound."""
    x = torch.tensor([[0.0, 0.1, 0.5, 1.0]], dtype=F64).expand(4000, 4)
    z = start(0.3).fresh(constraint, x, seeded(0))
    free = start(0.3, clip=False).fresh(constraint, x, seeded(0))
    assert torch.equal(z, torch.minimum(torch.maximum(free, -x), 1 - x))
    assert free.abs().max() <= 0.3 and free.abs().amax(0).min() > 0.29
    assert (free.mean(0).abs() < 5 * 0.3 / 4000**0.5).all()  # fair, within five standard deviations
    if start is ba.Uniform:
        share = (x + z == 0).double().mean(0)
        torch.testing.assert_close(share, torch.tensor([1 / 2, 1 / 3, 0, 0], dtype=F64), atol=0.04, rtol=0)
        quantiles = torch.quantile(free, torch.tensor([0.25, 0.5, 0.75], dtype=F64))
        torch.testing.assert_close(quantiles, torch.tensor([-0.15, 0, 0.15], dtype=F64), atol=0.01, rtol=0)
    else:
        assert (free.abs() == 0.3).all()


@CUBES
def test_a_radius_is_not_cut_where_there_is_no_input_range(start):
    x = torch.zeros(100, 3)
    for constraint in (ba.LinfBall(0.1, None), ba.Range(None), ba.L2Ball(0.1)):
        assert torch.equal(*(start(0.3, clip).fresh(constraint, x, seeded(0)) for clip in (True, False)))


@CUBES
def test_a_start_without_a_radius_is_the_constraints(start):
    x = torch.rand(50, 4, dtype=F64)
    z = start().fresh(ba.LinfBall(0.1), x, seeded(0))
    low, high = ba.LinfBall(0.1).box(x)
    assert ((z >= low) & (z <= high)).all()
    if start is ba.Uniform:
        assert torch.equal(z, ba.LinfBall(0.1).sample(x, seeded(0)))
    else:
        assert ((z == low) | (z == high)).all()


@CUBES
def test_a_radius_is_at_least_zero(start):
    with pytest.raises(ba.InputError, match="radius is -0.1"):
        start(-0.1)
    assert not start(0.0).fresh(ba.LinfBall(0.1), torch.rand(2, 3), seeded(0)).any()


def test_all_of_space_has_no_uniform_draw():
    with pytest.raises(ba.InputError, match="all of space, which has no uniform draw; give the start a radius"):
        ba.Uniform().fresh(ba.Range(None), torch.zeros(1, 2), None)


def test_a_gaussian_start_is_projected_or_not():
    x = torch.rand(500, 4, dtype=F64)
    noise = 0.2 * torch.randn(x.shape, generator=seeded(0), dtype=F64)
    ball = ba.LinfBall(0.1)
    assert torch.equal(ba.Gaussian(0.2, clip=False).fresh(ball, x, seeded(0)), noise)
    assert torch.equal(ba.Gaussian(0.2).fresh(ball, x, seeded(0)), ball.project(noise, x))
    assert not torch.equal(noise, ball.project(noise, x))


def remembering(anchor, constraint=None, step=0.05):
    ball = ba.LinfBall(0.1) if constraint is None else constraint
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ball, anchor, "sign", step)
    return ba.BilevelProblem(ba.UpperProblem(), lower)


def test_what_is_remembered_by_position_needs_no_index():
    """A short batch uses, and rewrites, its first rows alone."""
    model, problem = dense(6, 5, 3), remembering(ba.Remembered("zero", by="position"))
    first = ZeroIG().backward(problem, model, batch_of(4, 6)).solution
    assert not first.anchor.any()
    second = ZeroIG().backward(problem, model, batch_of(2, 6)).solution
    assert torch.equal(second.anchor, first.delta[:2])
    third = problem.lower.solve(model, batch_of(4, 6))
    assert torch.equal(third.anchor, torch.cat([second.delta, first.delta[2:]]))
    longer = problem.lower.solve(model, batch_of(5, 6))
    assert torch.equal(longer.anchor[:4], third.anchor) and not longer.anchor[4].any()


def test_what_is_remembered_is_projected_or_not():
    """Where the same example comes with other pixels, its δ may be outside their set."""
    model, batch = dense(6, 5, 3), batch_of(4, 6).replace(index=torch.arange(4))
    other = batch.replace(x=1 - 0.05 * batch.x)
    for clip in (True, False):
        problem = remembering(ba.Remembered("zero", clip=clip))
        delta = ZeroIG().backward(problem, model, batch).solution.delta
        anchor = problem.lower.solve(model, other).anchor
        assert torch.equal(anchor, ba.LinfBall(0.1).project(delta, other.x) if clip else delta)
    assert not torch.equal(delta, ba.LinfBall(0.1).project(delta, other.x))


def test_views_are_followed_or_not():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).double()
    images, y, index = torch.rand(3, 1, 4, 4, dtype=F64), torch.tensor([0, 1, 2]), torch.arange(3)
    first, second = (ba.CropFlip.draw(3, 1, seeded(i), torch.device("cpu")) for i in (0, 1))
    batches = [ba.Batch(v.apply(v.pad(images)), y, index, v) for v in (first, second)]
    for follow in (True, False):
        problem = remembering(ba.Remembered("zero", view=follow), ba.LinfBall(0.1, None))
        delta = ZeroIG().backward(problem, model, batches[0]).solution.delta
        anchor = problem.lower.solve(model, batches[1]).anchor
        assert torch.equal(
            anchor, second.apply(first.write(torch.zeros(3, 1, 6, 6, dtype=F64), delta)) if follow else delta
        )
    assert not torch.equal(second.apply(first.write(torch.zeros(3, 1, 6, 6, dtype=F64), delta)), delta)


def test_a_memory_begins_where_it_is_told_to():
    """Fresh rows are drawn without the input range, known ones are not; the draws do not depend on which are known."""
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    noise = 0.02 * torch.randn(4, 6, generator=seeded(3), dtype=F64)
    for start, expected in (
        ("zero", torch.zeros_like(batch.x)),
        ("uniform", ba.LinfBall(0.1, None).sample(batch.x, seeded(3))),
        (ba.Gaussian(0.02), ba.LinfBall(0.1, None).project(noise, batch.x)),
    ):
        problem = remembering(ba.Remembered(start))
        known, rest = batch.replace(index=torch.tensor([1, 3, 5, 7])), batch.replace(index=torch.tensor([3, 0, 2, 1]))
        z = problem.lower.solve(model, rest, generator=seeded(3)).anchor
        torch.testing.assert_close(z, ba.LinfBall(0.1).project(expected, batch.x))
        delta = ZeroIG().backward(problem, model, known).solution.delta
        again = problem.lower.solve(model, rest, generator=seeded(3)).anchor
        assert torch.equal(again[[1, 2]], z[[1, 2]])
        assert torch.equal(again[[0, 3]], ba.LinfBall(0.1).project(delta[[1, 0]], batch.x[[0, 3]]))


def test_another_rule_of_forgetting():
    class Late(ba.Remembered):
        """Forgets in the second half of training."""

        def resets(self, epoch, epochs):
            return epoch >= epochs / 2

    model, batch = dense(6, 5, 3), batch_of(4, 6).replace(index=torch.arange(4))
    problem, emptied = remembering(Late("zero")), []
    for epoch in range(4):
        problem.set_epoch(epoch, 4)
        emptied.append(not problem.lower.solve(model, batch).anchor.any())
        ZeroIG().backward(problem, model, batch)
    assert emptied == [True, False, True, True]


def test_noise_beyond_the_threat_is_one_composition():
    """N-FGSM (de Jorge et al., 2022): noise in a cube of 2 ε, a step of ε, and δ not clipped to ε."""
    model, batch, epsilon = dense(6, 5, 3), batch_of(5, 6), 0.1
    lower = ba.Linearized(
        ba.minus(ba.cross_entropy), ba.Range(), ba.Uniform(2 * epsilon, clip=False), "sign", epsilon, mode="train"
    )
    problem = ba.BilevelProblem(ba.UpperProblem(), lower, threat=ba.LinfBall(epsilon))
    solution = problem.lower.solve(model, batch, generator=seeded(1))
    noise = 2 * epsilon * (2 * torch.rand(5, 6, generator=seeded(1), dtype=F64) - 1)
    expected = noise + epsilon * ce_gradient(model, batch.x + noise, batch.y).sign()
    torch.testing.assert_close(solution.delta, expected.clamp(-batch.x, 1 - batch.x))
    assert solution.delta.abs().max() > 2 * epsilon
    assert problem.threat == ba.LinfBall(epsilon) and problem.lower.constraint == ba.Range()
    assert ba.BilevelProblem(ba.UpperProblem(), lower).threat == ba.Range()


@pytest.mark.parametrize("make", ["class name", "class object", "attribute"])
def test_an_anchor_is_the_objects_own_however_it_is_given(make):
    """Named or made on the class, or named on an object: it remembers, is in the state, and is not shared."""

    class ByName(Quadratic):
        anchor = "remembered"

    class ByObject(Quadratic):
        anchor = ba.Remembered()

    class Later(Quadratic):
        def __init__(self):
            self.anchor = "remembered"

    kind = {"class name": ByName, "class object": ByObject, "attribute": Later}[make]
    one, two = (ba.BilevelProblem(ba.UpperProblem(), kind()) for _ in range(2))
    model, batch = dense(6, 5, 3), batch_of(3, 6).replace(index=torch.arange(3))
    delta = ZeroIG().backward(one, model, batch).solution.delta
    assert torch.equal(one.lower.solve(model, batch).anchor, delta)
    assert set(one.state_dict()) == {"lower.anchor"} and two.lower.anchor.memory.values is None
