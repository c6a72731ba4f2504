"""Conformance: closed forms that are right, this library's solvers against them, and what the command says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bilevel_at.commands.conformance import command
from bilevel_at.conformance import measure as measuring
from bilevel_at.conformance import ours
from bilevel_at.conformance.measure import EXACT, Point, Row, measure, relative_error
from bilevel_at.conformance.method import Library, Method, Missing
from bilevel_at.conformance.problems import problems
from bilevel_at.conformance.sets import Everywhere
from bilevel_at.conformance.tally import Tally, counted
from bilevel_at.errors import BilevelError, InputError

PROBLEMS = {problem.name: problem for problem in problems()}
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


@each_problem
def test_the_closed_form_is_the_derivative_of_the_closed_form_solution(problem):
    steps = 1e-6 * np.eye(len(problem.theta))
    differences = np.array([problem.value(problem.theta + h) - problem.value(problem.theta - h) for h in steps]) / 2e-6
    assert np.linalg.norm(differences - problem.hypergradient) < 1e-8 * np.linalg.norm(differences)


@each_problem
def test_the_solution_is_feasible_and_optimal(problem):
    """No feasible point nearby is lower, and the gradient vanishes along the free directions."""
    free, _ = problem.feasible.tangent(problem.delta, problem.residual())
    lower = lambda delta: problem.lower(np, problem.arrays, problem.theta, delta)  # noqa: E731
    slopes = [(lower(problem.delta + h) - lower(problem.delta - h)) / 2e-6 for h in 1e-6 * free.T]
    assert np.abs(slopes).max(initial=0) < 1e-7
    assert problem.delta == pytest.approx(_project(problem, problem.delta), abs=1e-12)
    rng = np.random.default_rng(1)
    for _ in range(50):
        near = _project(problem, problem.delta + 0.05 * rng.standard_normal(len(problem.delta)))
        assert lower(near) >= lower(problem.delta) - 1e-12


def _project(problem, delta):
    constraint = ours._constraint(problem)
    return constraint.project(torch.from_numpy(delta)[None], torch.zeros(1, len(delta)).double())[0].numpy()


@each_problem
def test_second_derivatives_are_those_of_the_lower_level(problem):
    arrays = {name: torch.from_numpy(array) for name, array in problem.arrays.items()}
    at = torch.from_numpy(problem.theta), torch.from_numpy(problem.delta)
    both = torch.autograd.functional.hessian(lambda theta, d: problem.lower(torch, arrays, theta, d), at)
    assert both[1][1].numpy() == pytest.approx(problem.hessian(), abs=1e-10)
    assert both[1][0].numpy() == pytest.approx(problem.cross(), abs=1e-10)


@each_problem
def test_there_is_something_to_get_wrong(problem):
    """The implicit term is a good part of each hypergradient, and each constraint binds in part."""
    direct = problem.arrays["M"] @ problem.delta + problem.theta
    assert relative_error(problem, direct) > 0.1
    free, _ = problem.feasible.tangent(problem.delta, problem.residual())
    assert isinstance(problem.feasible, Everywhere) or 0 < free.shape[1] < len(problem.delta)


def test_products_are_counted_where_they_are_made():
    tally, x = Tally(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(counted(x, tally).pow(3).sum(), x, create_graph=True)
    assert (tally.products, tally.gradients) == (0, 1)
    for _ in range(2):
        (product,) = torch.autograd.grad(gradient, x, torch.ones(3).double(), retain_graph=True)
    assert (tally.products, tally.gradients) == (2, 3)
    assert product.tolist() == [6.0] * 3


@pytest.fixture(scope="module")
def found():
    return measure(["bilevel-at"])


def test_exact_solvers_are_exact(found):
    exact = [row for row in found.rows if row.exact]
    assert {row.problem for row in exact} == PROBLEMS.keys()
    assert {row.method.split(",")[0] for row in exact} == {"FullKKT", "Neumann", "HessianFreeKKT", "ProjectionAdjoint"}
    assert [row for row in exact if not row.last.error <= EXACT] == []


def test_conjugate_gradients_take_no_more_products_than_there_are_directions(found):
    """And one with the cross derivative; rounding may ask for a few more."""
    for row in found.rows:
        if row.method == "FullKKT, conjugate gradients":
            free, _ = PROBLEMS[row.problem].feasible.tangent(
                PROBLEMS[row.problem].delta, PROBLEMS[row.problem].residual()
            )
            assert row.products_to(1e-8) <= free.shape[1] + 4


def test_the_value_function_errs_by_the_square_of_s(found):
    for row in found.rows:
        if row.method == "ValueFunction" and row.problem != "proximal, box":  # there the large s changes what binds
            first, second = row.points[0], row.points[1]
            assert second.error == pytest.approx(first.error / 100, rel=0.3)


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    page, data = tmp_path / "page.md", tmp_path / "data.json"
    assert command(["--libraries", "bilevel-at", "--markdown", str(page), "--json", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "FullKKT" in shown and "Versions: bilevel-at" in shown
    rows = json.loads(data.read_text())["rows"]
    worst = max(row["points"][-1]["error"] for row in rows if row["method"] == "FullKKT, dense")
    assert worst < EXACT
    text = page.read_text()
    assert all(f"g = {problem.formula}" in text for problem in PROBLEMS.values())
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_libraries_that_are_not_installed_are_named_with_the_way_to_get_them(monkeypatch, capsys):
    def missing():
        raise Missing("not installed; pip install it")

    monkeypatch.setitem(measuring.LIBRARIES, "Betty", missing)
    monkeypatch.setitem(measuring.LIBRARIES, "bilevel-at", _nothing)
    assert command(["--libraries", "bilevel-at", "Betty"]) == 0
    assert "Betty: not installed; pip install it." in capsys.readouterr().out


def _nothing():
    return Library("bilevel-at", {}, lambda problem: [])


def test_a_solver_of_ours_that_is_wrong_is_an_error(monkeypatch, capsys):
    def off(problem, value, tally):
        return 1.001 * problem.hypergradient

    monkeypatch.setitem(
        measuring.LIBRARIES, "bilevel-at", lambda: Library("bilevel-at", {}, lambda problem: [Method("off", off)])
    )
    with pytest.raises(BilevelError, match=r"not exact: off on quadratic \(1e-03\)"):
        command(["--libraries", "bilevel-at"])


def test_a_library_that_raises_is_a_row_that_says_so(monkeypatch, capsys):
    def fails(problem, value, tally):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(
        measuring.LIBRARIES, "BOAT", lambda: Library("BOAT", {}, lambda problem: [Method("CG", fails, exact=False)])
    )
    assert command(["--libraries", "BOAT"]) == 0
    shown = capsys.readouterr().out
    assert "BOAT, CG failed: RuntimeError: no such luck." in shown and "failed" in shown


def test_an_unknown_library_is_a_mistake():
    with pytest.raises(InputError, match="--libraries"):
        command(["--libraries", "tensorflow"])


def test_products_to_an_error_are_those_from_which_on_it_stays_below():
    points = tuple(Point(i, error, i, 0) for i, error in enumerate([1.0, 1e-9, 1e-3, 1e-8, 1e-12]))
    row = Row("p", "l", "m", "", True, "", points)
    assert row.products_to(1e-6) == 3 and row.within(2).error == 1e-3 and row.within(-1) is None
    nan = Row("p", "l", "m", "", True, "", (*points, Point(5, float("nan"), 5, 0)))
    assert nan.products_to(1e-6) is None
