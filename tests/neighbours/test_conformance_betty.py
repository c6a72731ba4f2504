"""Betty 0.2.1 beside closed forms: neumann is right, cg is not, and why."""

from __future__ import annotations

import inspect
import sys
from importlib import metadata

import pytest

pytest.importorskip("betty", reason="pip install --no-deps --ignore-requires-python betty-ml==0.2.1")

from bilevel_at.conformance import with_betty
from bilevel_at.conformance.measure import EXACT, measure, relative_error
from bilevel_at.conformance.problems import problems
from bilevel_at.conformance.tally import Tally

UNCONSTRAINED = ["quadratic", "ridge", "Poisson"]


@pytest.fixture(scope="module")
def rows():
    return {(row.problem, row.method): row for row in measure(["Betty"]).rows}


def test_it_takes_the_unconstrained_problems(rows):
    assert {problem for problem, _ in rows} == set(UNCONSTRAINED)


@pytest.mark.parametrize("problem", UNCONSTRAINED)
def test_neumann_is_exact(rows, problem):
    row = rows[problem, "neumann"]
    assert row.last.error < EXACT
    assert [point.products for point in row.points] == [point.value for point in row.points]


@pytest.mark.parametrize("problem", UNCONSTRAINED)
def test_darts_takes_the_hessian_for_the_identity(rows, problem):
    """It returns ∇_θ f − (∇²_δθ g)ᵀ v, whatever H is."""
    p = next(p for p in problems() if p.name == problem)
    v = p.delta - p.arrays["t"] + p.arrays["M"].T @ p.theta
    identity = p.arrays["M"] @ p.delta + p.theta - p.cross().T @ v
    darts = next(method for method in with_betty.library().methods(p) if method.name == "darts")
    assert darts.hypergradient(p, 1e-4, Tally()) == pytest.approx(identity, rel=1e-5, abs=1e-6)
    assert rows[problem, "darts"].last.error > 0.05


is_021 = pytest.mark.skipif(
    metadata.version("betty-ml") != "0.2.1", reason="the residual is stale in 0.2.1; its repository has mended it"
)


@is_021
@pytest.mark.parametrize("problem", UNCONSTRAINED)
def test_conjugate_gradients_of_021_get_worse_with_iterations(rows, problem):
    row = rows[problem, "cg"]
    errors = {point.value: point.error for point in row.points}
    assert errors[40] > errors[20] > errors[5] > 0.1


@is_021
def test_and_the_cause_is_the_stale_residual(monkeypatch):
    """With the new residual in the new direction, and no other change, they are exact."""
    import betty.hypergradient as hypergradient

    module = sys.modules["betty.hypergradient.cg"]
    stale, fresh = "for rr, pp in zip(r, p)]\n\n", "for rr, pp in zip(r_new, p)]\n\n"
    source = inspect.getsource(module)
    assert source.count(stale) == 1
    mended: dict[str, object] = {}
    exec(compile(source.replace(stale, fresh), module.__file__, "exec"), mended)
    monkeypatch.setitem(hypergradient.jvp_fn_mapping, "cg", mended["cg"])
    for problem in problems()[:3]:
        cg = next(method for method in with_betty.library().methods(problem) if method.name == "cg")
        assert relative_error(problem, cg.hypergradient(problem, 30, Tally())) < EXACT
