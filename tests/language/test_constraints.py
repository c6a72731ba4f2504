"""Projections are feasible, idempotent and nearest; samples are feasible; active sets are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from convex_sets import assert_feasible, cases, points
from hypothesis import given
from hypothesis import strategies as st
from networks import ATK, F64, batch_of, dense
from scipy.optimize import NonlinearConstraint, minimize

import bilevel_at as ba
from bilevel_at.diagnose.counting import operations
from bilevel_at.solvers import HessianFreeKKT
from bilevel_at.testing import VacuousCheck, hypergradcheck
from bilevel_at.testing import strategies as bst

KINDS = pytest.mark.parametrize("kind", ["box", "l2", "polyhedron"])


@KINDS
@given(data=st.data())
def test_projection_is_feasible_and_idempotent(kind, data):
    constraint, delta, x = data.draw(cases(kind))
    once = constraint.project(delta, x)
    assert once.shape == delta.shape
    assert_feasible(constraint, once, x)
    torch.testing.assert_close(constraint.project(once, x), once, rtol=0, atol=1e-10)


@KINDS
@given(data=st.data())
def test_projection_is_nearest(kind, data):
    """⟨δ − P(δ), y − P(δ)⟩ ≤ 0 for every y in C, which characterises the projection onto a convex set."""
    constraint, delta, x = data.draw(cases(kind))
    nearest = constraint.project(delta, x)
    for seed in range(5):
        inside = constraint.sample(x, torch.Generator().manual_seed(seed))
        assert_feasible(constraint, inside, x)
        assert ((delta - nearest) * (inside - nearest)).flatten(1).sum(1).max() <= 1e-8


@given(seed=bst.seeds, epsilon=st.floats(0.1, 1.5))
def test_l2_ball_in_the_input_range_against_scipy(seed, epsilon):
    delta, x = points((5,), 1, seed)
    ours = ba.L2Ball(epsilon, bounds=(0, 1)).project(delta, x)[0].numpy()
    u, at = delta[0].numpy(), x[0].numpy()
    reference = minimize(
        lambda d: 0.5 * np.sum((d - u) ** 2),
        np.zeros(5),
        jac=lambda d: d - u,
        bounds=list(zip(-at, 1 - at, strict=True)),
        constraints=[NonlinearConstraint(lambda d: d @ d, -np.inf, epsilon**2, jac=lambda d: 2 * d[None])],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(ours, reference.x, atol=1e-5)


@given(d=st.integers(1, 40), epsilon=st.floats(0.0, 4.0), seed=bst.seeds, dtype=st.sampled_from([F64, torch.float32]))
def test_l2_ball_in_the_input_range_by_one_sort_or_by_rounds(d, epsilon, seed, dtype):
    """A GPU takes the sort, which needs no look; zeros, inputs at a bound, and equal values among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(7, d, generator=g, dtype=dtype)
    x = torch.where(torch.rand(7, d, generator=g) < 0.3, x.round(), x)
    u = torch.randn(7, d, generator=g, dtype=dtype)
    u = torch.where(torch.rand(7, d, generator=g) < 0.3, u.round(), u)
    ball, low, high = ba.L2Ball(epsilon, bounds=(0, 1)), -x, 1 - x
    one, other = ball._scale_by_rounds(u, low, high), ball._scale_by_sort(u, low, high)
    points = [torch.clamp(s[:, None] * u, low, high) for s in (one, other)]
    torch.testing.assert_close(*points, rtol=0, atol=8 * torch.finfo(dtype).eps * max(1, epsilon))


@given(shape=bst.shapes(8), epsilon=st.floats(0.01, 0.5), seed=bst.seeds)
def test_linf_ball_is_the_polyhedron_of_its_faces(shape, epsilon, seed):
    """Fast-BAT paper, equation 10: B = [I; −I]."""
    delta, x = points(shape, 2, seed, scale=epsilon)
    d = x[0].numel()
    eye = torch.eye(d, dtype=F64)
    faces = ba.Polyhedron(torch.cat([eye, -eye]), torch.full((2 * d,), epsilon, dtype=F64), bounds=(0, 1))
    ball = ba.LinfBall(epsilon)
    torch.testing.assert_close(faces.project(delta, x), ball.project(delta, x), atol=1e-9, rtol=0)
    at = ball.project(delta, x)
    v = torch.randn_like(delta)
    torch.testing.assert_close(faces.active(at, x).tangent(v), ball.active(at, x).tangent(v), atol=1e-8, rtol=0)


def test_box_is_cut_to_the_input_range():
    x = torch.tensor([[0.0, 0.1, 0.5, 0.95, 1.0]])
    low, high = ba.LinfBall(0.2).box(x)
    torch.testing.assert_close(low, torch.tensor([[0.0, -0.1, -0.2, -0.2, -0.2]]))
    torch.testing.assert_close(high, torch.tensor([[0.2, 0.2, 0.2, 0.05, 0.0]]))
    low, high = ba.LinfBall(0.2, bounds=None).box(x)
    assert (low == -0.2).all() and (high == 0.2).all()


def test_samples_fill_the_box():
    x = torch.rand(1, 6, dtype=F64).expand(4000, 6)
    low, high = ba.LinfBall(0.3).box(x)
    draws = ba.LinfBall(0.3).sample(x, torch.Generator().manual_seed(0))
    # mean and variance of the uniform distribution, within five standard errors
    width = (high - low)[0]
    assert ((draws.mean(0) - (low + high)[0] / 2).abs() < 5 * width / (12 * 4000) ** 0.5).all()
    assert ((draws.var(0) / (width**2 / 12) - 1).abs() < 5 * (0.8 / 4000) ** 0.5 + 0.01).all()
    corners = ba.Corner().fresh(ba.LinfBall(0.3), x, torch.Generator().manual_seed(0))
    assert ((corners == low) | (corners == high)).all()
    assert ((corners == low).double().mean(0) - 0.5).abs().max() < 0.05


def test_l2_samples_are_uniform_in_the_ball():
    x = torch.zeros(4000, 3, dtype=F64)
    radius = ba.L2Ball(2.0).sample(x, torch.Generator().manual_seed(0)).norm(dim=1) / 2
    assert radius.max() <= 1
    # the radius cubed is uniform in three dimensions
    quantiles = torch.quantile(radius**3, torch.tensor([0.25, 0.5, 0.75], dtype=F64))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75], dtype=F64), atol=0.03, rtol=0)


@KINDS
@given(data=st.data())
def test_tangent_is_an_orthogonal_projector(kind, data):
    constraint, delta, x = data.draw(cases(kind))
    at = constraint.project(delta, x)
    active = constraint.active(at, x)
    v = torch.randn_like(at)
    T = active.projector(F64)
    once = active.tangent(v)
    torch.testing.assert_close((T @ v.flatten(1)[..., None]).squeeze(-1), once.flatten(1))
    torch.testing.assert_close(active.tangent(once), once)
    torch.testing.assert_close(T, T.mT)
    matrix = torch.randn_like(T)
    torch.testing.assert_close(active.restricted(matrix), T @ matrix @ T + torch.eye(len(T[0]), dtype=F64) - T)


def test_a_mask_is_no_product_of_matrices():
    active = ba.LinfBall(0.1).active(torch.full((2, 3, 4), 0.1), torch.full((2, 3, 4), 0.5))
    assert operations(lambda: active.restricted(torch.randn(2, 12, 12))) == 0


@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf"), "8/255", None, True])
def test_epsilon_must_be_a_number_at_least_zero(epsilon):
    for ball in (ba.LinfBall, ba.L2Ball):
        with pytest.raises(ba.InputError, match="epsilon is"):
            ball(epsilon)


def test_bad_sets_and_inputs_are_named():
    with pytest.raises(ba.InputError, match=r"bounds are \(1, 0\)"):
        ba.LinfBall(0.1, bounds=(1, 0))
    with pytest.raises(ba.InputError, match=r"from 0 to 255; .* takes inputs in \[0, 1\]"):
        ba.LinfBall(0.1).check(torch.tensor([[0.0, 255.0]]))
    with pytest.raises(ba.InputError, match="takes inputs in"):
        ba.L2Ball(0.1, bounds=(0, 1)).check(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ba.InputError, match=r"B has shape \(2, 3\) and b \(3,\)"):
        ba.Polyhedron(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ba.InputError, match="inputs have 2 values; this polyhedron's B has 3 columns"):
        ba.Polyhedron(torch.ones(2, 3), torch.ones(2)).project(torch.zeros(1, 2), torch.zeros(1, 2))
    empty = ba.Polyhedron(torch.tensor([[1.0], [-1.0]]), torch.tensor([-1.0, -1.0]))
    with pytest.raises(ba.InputError, match="the polyhedron is empty"):
        empty.project(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ba.InputError, match="L2Ball has no random corner"):
        ba.Corner().fresh(ba.L2Ball(1.0), torch.zeros(1, 2), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projected_coordinates_count_as_active(dtype):
    x = torch.rand(8, 1, 6, 6, dtype=dtype)
    ball = ba.LinfBall(8 / 255)
    at = ball.project(torch.randn_like(x), x)
    active = ball.active(at, x)
    low, high = ball.box(x)
    assert torch.equal(~active.free, (at <= low) | (at >= high))
    assert 0 < active.fraction_free() < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0, 10.0])
def test_points_projected_onto_the_sphere_count_as_on_it(dtype, epsilon):
    """Also in float32 and in many dimensions, where ‖P(δ)‖ misses ε by rounding."""
    delta, x = (points((3, 32, 32), 16, 0)[i].to(dtype) for i in (0, 1))
    ball = ba.L2Ball(epsilon)
    at = ball.project(delta, x)
    gradient = -at  # pointing inwards: the multiplier is positive
    assert (ball.active(at, x, gradient).curvature > 0).all()
    inside = ball.project(delta, x) * 0.99
    assert (ball.active(inside, x, gradient).curvature == 0).all()


def test_attack_steps_have_a_scale():
    one_sided = ba.Polyhedron(torch.cat([torch.eye(2), -torch.eye(2)]), torch.tensor([0.3, 0.3, 0.0, 0.0]))
    assert one_sided.steepest == "normalized" and one_sided.radius == pytest.approx(0.3)
    assert one_sided.reach == pytest.approx(0.3 * 2**0.5)  # its corner is that far
    cone = ba.Polyhedron(torch.eye(2), torch.zeros(2))
    assert cone.radius is None and cone.reach is None
    ball, sphere = ba.LinfBall(0.1), ba.L2Ball(0.5)
    assert (ball.steepest, ball.radius) == ("sign", 0.1) and (sphere.steepest, sphere.radius) == ("normalized", 0.5)
    assert ba.LinfBall(np.float32(0.1)).epsilon == pytest.approx(0.1)


@pytest.mark.parametrize("ball", [ba.LinfBall(0.0), ba.L2Ball(0.0), ba.L2Ball(0.0, bounds=(0, 1))])
def test_a_ball_of_radius_zero_holds_everything(ball):
    lower = ba.Linearized(ATK, ball, "zero", "taylor", 1.0)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    step = HessianFreeKKT().hypergradient(problem, dense(6, 5, 3), batch_of(3, 6))
    assert step.implicit_norm == 0 and (step.solution.delta == 0).all()
    more = {"rtol": 1e-6, "eps": 1e-5}
    assert hypergradcheck(problem, HessianFreeKKT(), dense(6, 5, 3), batch_of(3, 6), min_implicit=0, **more)
    with pytest.raises(VacuousCheck, match=r"with 0 % of the directions of δ\* free"):
        hypergradcheck(problem, HessianFreeKKT(), dense(6, 5, 3), batch_of(3, 6), **more)


def test_a_range_is_the_input_range_alone():
    x, delta = torch.rand(5, 2, 3, dtype=F64), 2 * torch.randn(5, 2, 3, dtype=F64)
    everything = ba.Range()
    assert torch.equal(everything.project(delta, x), torch.minimum(torch.maximum(delta, -x), 1 - x))
    wide = ba.LinfBall(10.0)
    at, gradient = everything.project(delta, x), torch.randn_like(delta)
    assert torch.equal(at, wide.project(delta, x))
    assert (
        torch.equal(everything.active(at, x).free, wide.active(at, x).free) and not everything.active(at, x).free.all()
    )
    for set_ in (everything, wide):
        assert torch.equal(set_.strict_complementarity(at, x, gradient), wide.strict_complementarity(at, x, gradient))
    assert torch.equal(
        everything.sample(x, torch.Generator().manual_seed(0)), wide.sample(x, torch.Generator().manual_seed(0))
    )
    assert everything.unbounded() == ba.Range(None) and ba.Range((-1, 2)).bounds == (-1.0, 2.0)
    assert getattr(everything, "radius", None) is None
    with pytest.raises(ba.InputError, match=r"takes inputs in \[0, 1\]"):
        everything.check(x + 1)
    with pytest.raises(ba.InputError, match=r"bounds are \(1, 0\)"):
        ba.Range((1, 0))


def test_a_range_without_bounds_is_all_of_space():
    x, delta = 100 * torch.randn(5, 3, dtype=F64), 2 * torch.randn(5, 3, dtype=F64)
    space = ba.Range(None)
    assert torch.equal(space.project(delta, x), delta) and space.active(delta, x).free.all()
    assert (space.strict_complementarity(delta, x, delta) == torch.inf).all()
    with pytest.raises(ba.InputError, match="all of space, which has no uniform draw"):
        space.sample(x)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_hypergradients_in_a_range(bounds):
    lower = ba.Linearized(ATK, ba.Range(bounds), "zero", "taylor", 3.0)
    problem, model, batch = ba.BilevelProblem(ba.UpperProblem(), lower), dense(6, 5, 3), batch_of(4, 6)
    step = HessianFreeKKT().hypergradient(problem, model, batch)
    inside = step.solution.delta + batch.x
    assert step.implicit_norm > 1e-3 and (bounds is None or ((inside == 0) | (inside == 1)).any())
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch, eps=1e-5, rtol=1e-6)
