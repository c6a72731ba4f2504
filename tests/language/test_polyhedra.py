"""Projection onto polyhedra against scipy; dependent, scaled and unusual rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from convex_sets import assert_feasible, cases, points
from hypothesis import given
from hypothesis import strategies as st
from networks import F64
from scipy.optimize import LinearConstraint, minimize

import bilevel_at as ba


@given(data=st.data())
def test_polyhedron_against_scipy(data):
    """The same point as a general-purpose solver finds (SLSQP on the quadratic programme)."""
    constraint, delta, x = data.draw(cases("polyhedron"))
    ours = constraint.project(delta, x).flatten(1).numpy()
    B, b = constraint.rows(x)
    for u, right, mine in zip(delta.flatten(1).numpy(), b.numpy(), ours, strict=True):
        reference = minimize(
            lambda d, u=u: 0.5 * np.sum((d - u) ** 2),
            np.zeros_like(u),
            jac=lambda d, u=u: d - u,
            constraints=[LinearConstraint(B.numpy(), ub=right)],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(mine, reference.x, atol=1e-5)
        # ours is at least as close, up to what the other one violates the constraints by
        assert np.linalg.norm(mine - u) <= np.linalg.norm(reference.x - u) + 1e-6


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


@pytest.mark.parametrize("d", [5, 40])
def test_polyhedra_have_the_same_active_rows_in_float32(d):
    g = torch.Generator().manual_seed(0)
    B, b = torch.randn(6, d, generator=g), 0.3 * torch.rand(6, generator=g) + 0.05
    delta, x = torch.randn(32, d, generator=g), torch.rand(32, d, generator=g)
    for scale in (1.0, 10.0):
        sets = [ba.Polyhedron(B.to(t), scale * b.to(t)) for t in (torch.float32, torch.float64)]
        on = [s._on_faces(s.project(scale * delta.to(s.B), x), x)[0] for s in sets]
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


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_input_range_is_a_mask_and_leaves_what_all_its_rows_would(dtype):
    """T is the projector onto the null space of all active rows, the range's among them; one row repeats a bound."""
    g = torch.Generator().manual_seed(0)
    x = torch.full((64, 8), 0.5, dtype=dtype)
    B = torch.cat([torch.randn(5, 8, generator=g), torch.eye(8)[:1]]).to(dtype)
    b = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 0.5], dtype=dtype)
    both = ba.Polyhedron(B, b, (0, 1))
    at = both.project(torch.randn(64, 8, generator=g).to(dtype), x)
    rows, right = both.rows(x)
    touching = (right - at.double() @ rows.mT).abs() < 1e-6
    active = both.active(at, x)
    assert touching[:, :5].any() and (touching[:, 5] & touching[:, 6]).any() and (~active.free).any()
    _, singular, basis = torch.linalg.svd(rows * touching[..., None], full_matrices=False)
    normals = basis * (singular > 1e-6)[..., None]
    torch.testing.assert_close(
        active.projector(F64), torch.eye(8, dtype=F64) - normals.mT @ normals, atol=2e-5, rtol=0, check_dtype=False
    )
    assert active.normals.shape == (64, 6, 8)  # none for the range, which would be 16 more


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
    monkeypatch.setattr("scipy.optimize.nnls", gives_up)
    for polyhedron, delta, x, expected in cases:
        torch.testing.assert_close(polyhedron.project(delta, x), expected, atol=1e-9, rtol=0)
    at = ba.Polyhedron(torch.ones(1, 2), torch.ones(1)).project(torch.ones(1, 2), torch.zeros(1, 2))
    torch.testing.assert_close(at, torch.full((1, 2), 0.5))
