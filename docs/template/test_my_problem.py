from hypothesis import given, settings
from my_problem import problem

from bilevel_at.solvers import HessianFreeKKT
from bilevel_at.testing import assert_feasible, assert_kkt, assert_reproducible, hypergradcheck
from bilevel_at.testing import strategies as bst


@settings(deadline=None)
@given(bst.smooth_models((5,), 3), bst.batches((5,), 3))
def test_my_problem(model, batch):
    assert_reproducible(problem(), HessianFreeKKT(), model, batch)
    assert_feasible(problem(), model, batch)
    assert_kkt(problem(), model, batch)
    with bst.rejecting():
        assert hypergradcheck(problem(), HessianFreeKKT(), model, batch, min_margin=1e-4)
