"""Random constraints, and what a feasible point is."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

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
