"""Projections are feasible, idempotent and nearest; samples are feasible; active sets are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, NonlinearConstraint, minimize

import bilevel_at as ba
from bilevel_at.testing import strategies as bst

F64 = torch.float64


def points(shape, n, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn((n, *shape), generator=g, dtype=F64), torch.rand((n, *shape), generator=g, dtype=F64)


def assert_feasible(constraint, delta, x, tol=1e-9):
    if getattr(constraint, "bounds", None) is not None:
        assert ((x + delta) >= -tol).all() and ((x + delta) <= 1 + tol).all()
    if isinstance(constraint, ba.LinfBall):
        assert delta.abs().max() <= constraint.epsilon + tol
    elif isinstance(constraint, ba.L2Ball):
        assert delta.flatten(1).norm(dim=1).max() <= constraint.epsilon + tol
    else:
        assert (delta.flatten(1) @ constraint.B.mT <= constraint.b + tol).all()


@st.composite
def cases(draw, kind):
    shape = draw(bst.shapes(8))
    constraint = draw(
        {"box": lambda s: bst.boxes(), "l2": lambda s: bst.l2_balls(), "polyhedron": bst.polyhedra}[kind](shape)
    )
    delta, x = points(shape, draw(st.integers(1, 3)), draw(bst.seeds), draw(st.sampled_from([0.01, 0.3, 3.0])))
    return constraint, delta, x


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


@given(data=st.data())
def test_polyhedron_against_scipy(data):
    """The same point as a general-purpose solver finds (SLSQP on the quadratic programme)."""
    constraint, delta, x = data.draw(cases("polyhedron"))
    ours = constraint.project(delta, x).flatten(1).numpy()
    B, b = constraint.rows(x)
    for u, right, mine in zip(delta.flatten(1).numpy(), b.numpy(), ours, strict=True):
        found = minimize(
            lambda d, u=u: 0.5 * np.sum((d - u) ** 2),
            np.zeros_like(u),
            jac=lambda d, u=u: d - u,
            constraints=[LinearConstraint(B.numpy(), ub=right)],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(mine, found.x, atol=1e-5)
        # ours is at least as close, up to what the other one violates the constraints by
        assert np.linalg.norm(mine - u) <= np.linalg.norm(found.x - u) + 1e-6


@given(seed=bst.seeds, epsilon=st.floats(0.1, 1.5))
def test_l2_ball_in_the_input_range_against_scipy(seed, epsilon):
    delta, x = points((5,), 1, seed)
    ours = ba.L2Ball(epsilon, bounds=(0, 1)).project(delta, x)[0].numpy()
    u, at = delta[0].numpy(), x[0].numpy()
    found = minimize(
        lambda d: 0.5 * np.sum((d - u) ** 2),
        np.zeros(5),
        jac=lambda d: d - u,
        bounds=list(zip(-at, 1 - at, strict=True)),
        constraints=[NonlinearConstraint(lambda d: d @ d, -np.inf, epsilon**2, jac=lambda d: 2 * d[None])],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(ours, found.x, atol=1e-5)


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
    corners = ba.LinfBall(0.3).corner(x, torch.Generator().manual_seed(0))
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


def test_polyhedron_where_scipy_s_nnls_failed():
    """scipy 1.15 calls this set empty, far from the point to be projected."""
    B = torch.tensor([[0.6614, 0.2669, 0.0617, 0.6213], [-0.4519, -0.1661, -1.5228, 0.3817]], dtype=F64)
    polyhedron = ba.Polyhedron(B, torch.tensor([0.2388, 0.3591], dtype=F64), bounds=(0, 1))
    x = torch.tensor([[0.5813, 0.2882, 0.4529, 0.1768]], dtype=F64)
    at = polyhedron.project(torch.tensor([[4.6230, -0.8803, -6.5364, 1.7053]], dtype=F64), x)
    torch.testing.assert_close(at, torch.tensor([[0.4187, -0.2330, -0.3170, 0.0702]], dtype=F64), atol=2e-4, rtol=0)
    assert_feasible(polyhedron, at, x)
    # another one, met on Python 3.10
    B = [[0.7439, -0.1917, 0.9264], [0.7905, 0.5521, -0.9535], [-2.0687, 1.1270, 0.5294], [-1.3012, -0.9776, -1.2377]]
    polyhedron = ba.Polyhedron(
        torch.tensor(B, dtype=F64), torch.tensor([0.4346, 0.3703, 0.5451, 0.3228], dtype=F64), bounds=(0, 1)
    )
    x = torch.tensor([[0.2768, 0.7496, 0.2867], [0.2103, 0.9696, 0.8135], [0.0699, 0.4915, 0.9439]], dtype=F64)
    far = torch.tensor([[2.5386, -3.1975, -0.9627], [-5.5308, -0.9991, -4.9527], [4.7281, -5.2316, 0.6088]], dtype=F64)
    assert_feasible(polyhedron, polyhedron.project(far, x), x)


def test_polyhedron_with_dependent_rows():
    """The same face twice, and a row of zeros, change nothing."""
    B = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]], dtype=F64)
    b = torch.tensor([1.0, 2.0, 0.0], dtype=F64)
    x = torch.zeros(1, 2, dtype=F64)
    at = ba.Polyhedron(B, b).project(torch.ones(1, 2, dtype=F64), x)
    torch.testing.assert_close(at, torch.full((1, 2), 0.5, dtype=F64))
    moved = ba.Polyhedron(B, b).active(at, x).tangent(torch.tensor([[1.0, 0.0]], dtype=F64))
    torch.testing.assert_close(moved, torch.tensor([[0.5, -0.5]], dtype=F64))


@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf"), "8/255", None, True])
def test_epsilon_must_be_a_number_at_least_zero(epsilon):
    for ball in (ba.LinfBall, ba.L2Ball):
        with pytest.raises(ba.InputError, match="epsilon is"):
            ball(epsilon)


def test_bad_sets_and_inputs_are_named():
    with pytest.raises(ba.InputError, match=r"bounds are \(1, 0\)"):
        ba.LinfBall(0.1, bounds=(1, 0))
    with pytest.raises(ba.InputError, match=r"from 0 to 255; .* takes inputs in \[0, 1\]"):
        ba.LinfBall(0.1).project(torch.zeros(1, 2), torch.tensor([[0.0, 255.0]]))
    with pytest.raises(ba.InputError, match="takes inputs in"):
        ba.LinfBall(0.1).sample(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ba.InputError, match=r"B has shape \(2, 3\) and b \(3,\)"):
        ba.Polyhedron(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ba.InputError, match="inputs have 2 values; this polyhedron's B has 3 columns"):
        ba.Polyhedron(torch.ones(2, 3), torch.ones(2)).project(torch.zeros(1, 2), torch.zeros(1, 2))
    empty = ba.Polyhedron(torch.tensor([[1.0], [-1.0]]), torch.tensor([-1.0, -1.0]))
    with pytest.raises(ba.InputError, match="the polyhedron is empty"):
        empty.project(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ba.InputError, match="L2Ball has no random corner"):
        ba.L2Ball(1.0).corner(torch.zeros(1, 2))


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


@pytest.mark.parametrize("d", [5, 40])
def test_polyhedra_have_the_same_active_rows_in_float32(d):
    g = torch.Generator().manual_seed(0)
    B, b = torch.randn(6, d, generator=g), 0.3 * torch.rand(6, generator=g) + 0.05
    delta, x = torch.randn(32, d, generator=g), torch.rand(32, d, generator=g)
    for scale in (1.0, 10.0):
        sets = [ba.Polyhedron(B.to(t), scale * b.to(t)) for t in (torch.float32, torch.float64)]
        on = [s._active_rows(s.project(scale * delta.to(s.B), x), x)[1] for s in sets]
        assert torch.equal(*on) and on[0].any()


def test_polyhedron_is_indifferent_to_the_length_of_its_rows():
    x, delta = torch.zeros(1, 2), torch.ones(1, 2)
    for scale in (1e-8, 1.0, 1e8):
        small = ba.Polyhedron(scale * torch.ones(1, 2), scale * torch.ones(1))
        torch.testing.assert_close(small.project(delta, x), torch.full((1, 2), 0.5))
        assert small.active(torch.zeros(1, 2), x).normals.abs().sum() == 0
    for dtype in (torch.float32, torch.float64):  # multiples of one row, as rounded, are one face
        row = torch.tensor([[0.3, -0.7, 0.1, 0.9, 0.2]], dtype=dtype)
        faces = ba.Polyhedron(torch.cat([row, 3 * row, 0.7 * row]), torch.tensor([0.1, 0.3, 0.07], dtype=dtype))
        at = faces.project(5 * row, torch.zeros(1, 5, dtype=dtype))
        assert faces.active(at, torch.zeros(1, 5, dtype=dtype)).projector(dtype)[0].trace().item() == pytest.approx(4)


def test_attack_steps_have_a_scale():
    one_sided = ba.Polyhedron(torch.cat([torch.eye(2), -torch.eye(2)]), torch.tensor([0.3, 0.3, 0.0, 0.0]))
    assert one_sided.attack_step() == ("normalized", pytest.approx(0.3))
    with pytest.raises(ba.InputError, match="no scale for FGSM or PGD"):
        ba.Polyhedron(torch.eye(2), torch.zeros(2)).attack_step()
    assert ba.LinfBall(np.float32(0.1)).epsilon == pytest.approx(0.1)


def test_polyhedra_of_unusual_rows():
    with pytest.raises(ba.InputError, match="constrains nothing"):
        ba.Polyhedron(torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(ba.InputError, match="a row of B is zero and its b negative"):
        ba.Polyhedron(torch.zeros(2, 3), -torch.ones(2))
    whole = ba.Polyhedron(torch.tensor([[1, -1]]), torch.tensor([0]))  # integers, and a cone
    x = torch.zeros(50, 2)
    at = whole.sample(x, torch.Generator().manual_seed(0))
    assert (at[:, 0] <= at[:, 1] + 1e-6).all() and at.abs().max() > 0.1
    assert whole.active(at, x).normals.abs().sum() > 0


def test_projection_goes_on_where_nnls_gives_up(monkeypatch):
    from bilevel_at import polyhedra

    def gives_up(*args, **kwargs):
        raise RuntimeError("Maximum number of iterations reached.")

    g = torch.Generator().manual_seed(0)
    cases = []
    for i in range(40):
        d, m = 1 + i % 6, 1 + i % 7
        B, b = torch.randn(m, d, generator=g, dtype=F64), 0.1 + torch.rand(m, generator=g, dtype=F64)
        polyhedron = ba.Polyhedron(B, b, (0, 1) if i % 2 else None)
        delta, x = points((d,), 3, i, scale=10.0 ** (i % 4 - 2))
        cases.append((polyhedron, delta, x, polyhedron.project(delta, x)))
    monkeypatch.setattr(polyhedra, "nnls", gives_up)
    for polyhedron, delta, x, expected in cases:
        torch.testing.assert_close(polyhedron.project(delta, x), expected, atol=1e-9, rtol=0)
    at = ba.Polyhedron(torch.ones(1, 2), torch.ones(1)).project(torch.ones(1, 2), torch.zeros(1, 2))
    torch.testing.assert_close(at, torch.full((1, 2), 0.5))
