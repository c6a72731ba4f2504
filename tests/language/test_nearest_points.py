"""The batched projection onto polyhedra against the one-by-one NNLS, its optimality conditions, and what it leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from convex_sets import points
from hypothesis import given
from hypothesis import strategies as st
from networks import F64
from scipy.optimize import nnls

import bilevel_at as ba
from bilevel_at import nearest_points as batched
from bilevel_at.nearest_points import Task, nearest_points, one_by_one, together
from bilevel_at.nnls import nearest_one_by_one

ROWS = ["independent", "twice", "nearly parallel", "small integers", "equalities", "redundant", "cone"]


def task(rows, seed, m, d, n, scale, bounds, dtype=F64):
    """n samples outside or inside of a set that is not empty: it has the point c, ``slack`` away from every row."""
    g = torch.Generator().manual_seed(seed)
    B = torch.randn(m, d, generator=g, dtype=F64)
    x = torch.rand(n, d, generator=g, dtype=F64)
    c = torch.zeros(d, dtype=F64)
    slack = 0.5 * torch.rand(m, generator=g, dtype=F64)
    half = m // 2
    if rows == "small integers":
        B = torch.randint(-1, 2, (m, d), generator=g).to(F64)
        B[:, 0] += (B == 0).all(1)  # no row of zeros
        slack = torch.randint(0, 3, (m,), generator=g).to(F64) / 2
    elif rows == "twice":
        B[half : 2 * half], slack[half : 2 * half] = B[:half].clone(), slack[:half].clone()
    elif rows == "nearly parallel":
        B[half : 2 * half] = B[:half] + 10.0 ** -(3 + seed % 6) * torch.randn(half, d, generator=g, dtype=F64)
        slack[half : 2 * half] = slack[:half].clone()
    elif rows == "equalities":
        B[half : 2 * half] = -B[:half]
        slack[: 2 * half] = 0
    elif rows == "redundant":
        slack[half:] += 100
    elif rows == "cone":
        slack = torch.zeros(m, dtype=F64)
    length = B.norm(dim=1)
    B, b = B / length[:, None], (slack / length + B @ c / length).expand(n, m)
    u = scale * torch.randn(n, d, generator=g, dtype=F64)
    u[::3] *= 0.01  # some inside, or nearly
    return Task(u.to(dtype).to(F64), B, b, *((-x, 1 - x) if bounds else ()))


@st.composite
def tasks(draw, largest=10):
    return task(
        draw(st.sampled_from(ROWS)),
        draw(st.integers(0, 2**31)),
        draw(st.integers(1, largest)),
        draw(st.integers(1, largest)),
        draw(st.integers(1, 6)),
        draw(st.sampled_from([0.01, 0.3, 3.0, 30.0])),
        draw(st.booleans()),
        draw(st.sampled_from([torch.float32, F64])),
    )


def distances(a, b, t):
    """How far the points are from each other, beside the size of what was projected."""
    return ((a - b).norm(dim=1) / (1 + t.u.norm(dim=1))).max().item()


@given(tasks())
def test_the_same_point_as_one_by_one(t):
    """To the 1e-9 that the one-by-one method allows itself, on every kind of rows."""
    expected = one_by_one(t)
    assert distances(together(t), expected, t) <= 1e-9
    public = nearest_points(t.u.float(), t.B, t.b, t.low, t.high)
    assert public.dtype == torch.float32 and not public.requires_grad
    exact = Task(t.u.float().double(), t.B, t.b, t.low, t.high)
    assert distances(public.double(), one_by_one(exact), t) <= 1e-6


def all_rows(t):
    """The inequalities with the bounds among them: (rows, right-hand sides)."""
    if t.low is None:
        return t.B, t.b
    eye = torch.eye(t.u.shape[1], dtype=F64)
    return torch.cat([t.B, eye, -eye]), torch.cat([t.b, t.high, -t.low], 1)


@given(tasks())
def test_conditions_of_optimality(t):
    """Feasible, and u − δ a non-negative combination of the rows that are active within 1e-10, as active sets are."""
    at = together(t)
    B, b = all_rows(t)
    size = 1 + t.u.norm(dim=1, keepdim=True)
    slack = b - at @ B.mT
    assert (slack >= -1e-10 * size).all()
    for u, point, on in zip(t.u, at, slack <= 1e-10 * size, strict=True):
        pull = (u - point).numpy()
        distance = nnls(B[on].mT.numpy(), pull)[1] if on.any() else np.linalg.norm(pull)
        assert distance <= 1e-8 * (1 + u.norm())


@given(tasks(), st.sampled_from([torch.float32, F64]))
def test_what_is_inside_stays_bit_for_bit(t, dtype):
    inside = (1e-3 * t.u).clamp(-0.01, 0.01).to(dtype)
    b = (inside.double() @ t.B.mT).clamp(min=0)  # on the face, where that is not 0's side
    low, high = (None, None) if t.low is None else (t.low.clamp(max=-0.01), t.high.clamp(min=0.01))
    assert torch.equal(nearest_points(inside, t.B, b, low, high), inside)
    assert nearest_points(inside[:0], t.B, b[:0], *((None, None) if low is None else (low[:0], high[:0]))).shape[0] == 0


@pytest.mark.parametrize("rows", ROWS)
def test_a_point_moved_by_roundings_is_on_its_face_again(rows):
    """As near as one by one, within 64 eps: a descent that projects stops there."""
    eps = torch.finfo(F64).eps
    for seed in range(20):
        t = task(rows, seed, 1 + seed % 4, 4 + seed % 5, 8, 1.0, bool(seed % 2))
        at = together(t)
        noise = torch.randn(at.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
        for size in (eps, 8 * eps, 64 * eps, 1e-12):
            moved = Task(at + size * noise, t.B, t.b, t.low, t.high)
            again = nearest_points(moved.u, t.B, t.b, t.low, t.high)
            assert (again - one_by_one(moved)).abs().max() <= 64 * eps


def test_what_counts_as_the_nearest_point():
    """Each condition by itself: the point is on the face, but the multiplier is negative; the row exceeded; not met."""
    row, side = torch.ones(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    for damped in (False, True):
        for u, y, nearest in ((3.0, 2.0, True), (0.0, -1.0, False), (3.0, 1.0, False), (3.0, 2.5, False)):
            t = Task(torch.full((1, 1), u, dtype=F64), row, side)
            _, done, _ = batched.newton(t, torch.full((1, 1), y, dtype=F64), 0, damped)
            assert done.item() is nearest


def counting(monkeypatch, name):
    """How many samples reach a function of the module."""
    counts, real = [0], getattr(batched, name)

    def count(t, *rest):
        counts[0] += len(t.u)
        return real(t, *rest)

    monkeypatch.setattr(batched, name, count)
    return counts


def many(n=16):
    return [
        task(rows, seed, 1 + seed % 12, 2 + seed % 9, n, 10.0 ** (seed % 4 - 2), bounds)
        for rows in ROWS
        for seed in range(24)
        for bounds in (False, True)
    ]


def test_hardly_any_sample_is_left(monkeypatch):
    """Of 5,376 samples, degenerate ones and up to five times as many rows as values among them, at most 0.5 %."""
    left, hard = counting(monkeypatch, "one_by_one"), counting(monkeypatch, "interior")
    tasks = many()
    for t in tasks:
        together(t)
    total = sum(len(t.u) for t in tasks)
    assert total == 5376 and left[0] <= 0.005 * total
    assert hard[0] > 0.05 * total  # Newton's method alone would not do


@pytest.mark.parametrize("part", ["newton", "interior"])
def test_each_method_may_fail(monkeypatch, part):
    """Without Newton's method before it the interior point method still leaves little; without that, NNLS does it."""
    if part == "newton":
        monkeypatch.setattr(batched, "PLAIN", (0,))
        monkeypatch.setattr(batched, "DAMPED", (0,))
    else:
        monkeypatch.setattr(batched, "INTERIOR", 0)
    left = counting(monkeypatch, "one_by_one")
    total = 0
    for t in many(n=4)[::3]:
        assert distances(together(t), nearest_one_by_one(t.u, *all_rows(t)), t) <= 1e-9
        total += len(t.u)
    assert left[0] <= 0.02 * total if part == "newton" else left[0] > 0


def test_a_sample_does_not_depend_on_the_others(monkeypatch):
    t = task("independent", 3, 9, 12, 24, 3.0, True)
    expected = together(t)
    for i in range(24):
        torch.testing.assert_close(together(t.of(slice(i, i + 1))), expected[i : i + 1], atol=1e-12, rtol=0)
    monkeypatch.setattr(batched, "ON_CPU", 5 * 9 * 12)  # blocks of five samples
    blocks = counting(monkeypatch, "together")
    at = nearest_points(t.u, t.B, t.b, t.low, t.high)
    torch.testing.assert_close(at, expected, atol=1e-12, rtol=0)
    assert blocks[0] == t.outside().sum()


def test_more_rows_than_values_go_one_by_one_on_a_cpu(monkeypatch):
    single, batch = counting(monkeypatch, "one_by_one"), counting(monkeypatch, "together")
    for m, d in ((3, 4), (4, 4), (5, 4)):
        t = task("independent", 0, m, d, 6, 3.0, False)
        outside = int(t.outside().sum())
        single[0] = batch[0] = 0
        nearest_points(t.u, t.B, t.b)
        assert outside > 0 and (batch[0], single[0]) == ((outside, 0) if m <= d else (0, outside))


@pytest.mark.parametrize("bounds", [None, (0, 1)])
def test_empty_sets(bounds):
    row = torch.tensor([[1.0, 2.0, -1.0]], dtype=F64)
    delta, x = points((3,), 5, 0)
    empty = ba.Polyhedron(torch.cat([row, -row]), torch.tensor([-1.0, -1.0]), bounds)
    with pytest.raises(ba.InputError, match="no δ satisfies Bδ ≤ b: the polyhedron is empty"):
        empty.project(delta, x)
    # Only the bounds make it empty, and only for the sample whose x is 0.
    far = ba.Polyhedron(-row, torch.tensor([-2.5]), bounds)
    x = torch.tensor([[0.0, 0.0, 1.0], [0.9, 0.9, 0.1]], dtype=F64)
    if bounds is None:
        assert (far.project(delta[:2], x) @ row.mT >= 2.5 - 1e-9).all()
    else:
        assert (far.project(delta[:1], x[:1]) @ row.mT >= 2.5 - 1e-9).all()
        with pytest.raises(ba.InputError, match="the polyhedron is empty"):
            far.project(delta[:2], x)


def test_the_result_is_detached():
    polyhedron = ba.Polyhedron(torch.eye(3), torch.full((3,), 0.1), (0, 1))
    delta = torch.ones(2, 3, requires_grad=True)
    at = polyhedron.project(delta, torch.full((2, 3), 0.5))
    assert not at.requires_grad and at.data_ptr() != delta.data_ptr()
    torch.testing.assert_close(at, torch.full((2, 3), 0.1))


@pytest.mark.parametrize("bounds", [False, True])
def test_no_round_waits_for_the_device(bounds):
    """On torch's meta device whatever looks at a value raises."""
    t = task("independent", 0, 4, 6, 5, 1.0, bounds)
    meta = Task(*(None if v is None else v.to("meta") for v in (t.u, t.B, t.b, t.low, t.high)))
    point, done, y = batched.newton(meta, torch.zeros_like(meta.b), 3, damped=bounds)
    assert point.shape == (5, 6) and done.shape == (5,) and y.shape == (5, 4)
    assert batched.interior(meta, 3).shape == (5, 4)


def test_the_reference_goes_on_where_nnls_gives_up(monkeypatch):
    """scipy 1.15 now and then returns something else than the solution, or runs out of iterations."""
    tasks = many(n=2)[::5]
    expected = [nearest_one_by_one(t.u, *all_rows(t)) for t in tasks]

    def gives_up(*args, **kwargs):
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr("scipy.optimize.nnls", gives_up)
    for t, at in zip(tasks, expected, strict=True):
        assert distances(nearest_one_by_one(t.u, *all_rows(t)), at, t) <= 1e-9
