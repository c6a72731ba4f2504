"""Conjugate gradients against dense solves, at every scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import F64, batch_of, dense, proximal

import bilevel_at as ba
from bilevel_at.solvers import FullKKT
from bilevel_at.solvers.linear import conjugate_gradients
from bilevel_at.testing import strategies as bst


@given(seed=bst.seeds, n=st.integers(1, 4), d=st.integers(1, 8), coupled=st.booleans())
def test_conjugate_gradients_against_a_dense_solve(seed, n, d, coupled):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(n, d, d, generator=g, dtype=F64)
    A = root @ root.mT + torch.eye(d, dtype=F64) * torch.logspace(-2, 2, n, dtype=F64)[:, None, None]
    right = torch.randn(n, d, generator=g, dtype=F64)
    right[0] = 0  # a sample that has nothing to solve must not become NaN
    w = conjugate_gradients(
        lambda p: (A @ p[..., None]).squeeze(-1), right, right, tol=1e-11, max_iter=1000, coupled=coupled
    )
    torch.testing.assert_close(w, torch.linalg.solve(A, right), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1e-22, 1e-30, 1e10])
def test_conjugate_gradients_at_any_scale(size):
    """In float32 the square of 1e-22 is 0: confident samples have such gradients."""
    right = torch.full((2, 8), size)
    right[1] = 1.0
    w = conjugate_gradients(lambda p: 0.5 * p, right, right)
    torch.testing.assert_close(w, 2 * right)


def test_cg_states_where_it_did_not_converge():
    with pytest.raises(ba.ConvergenceError, match=r"did not reach tol=.* in max_iter=1 steps on sample"):
        FullKKT(method="cg", max_iter=1, tol=1e-14).hypergradient(proximal(), dense(6, 5, 3), batch_of(4, 6))
