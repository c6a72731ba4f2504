"""hypergradcheck says what is wrong: in problems, in solvers, and in what lets nothing be checked."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from marks import thorough
from networks import ATK, batch_of, dense, proximal, taylor, with_batch_norm
from running import ROOT
from torch import nn
from wrong_problems import WRONG, OwnLower, own, relu

import bilevel_at as ba
from bilevel_at.problems import fastbat
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG
from bilevel_at.testing import CAUSES, HypergradError, VacuousCheck, activity_margin, hypergradcheck, hypergradreport
from bilevel_at.testing import strategies as bst


def test_the_right_form_of_the_wrong_problems_passes():
    assert hypergradcheck(own(OwnLower()), HessianFreeKKT(), dense(6, 5, 3), batch_of(4, 6))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_problem_is_named(name):
    cause, words, problem = WRONG[name]
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    before = copy.deepcopy(model.state_dict()), batch.x.clone()
    with pytest.raises(HypergradError) as error:
        hypergradcheck(problem(), HessianFreeKKT(), model, batch)
    assert error.value.cause == cause, str(error.value)
    assert words in error.value.report.explanation and cause in CAUSES
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert torch.equal(batch.x, before[1]) and all(p.grad is None for p in model.parameters())
    assert not hypergradcheck(problem(), HessianFreeKKT(), model, batch, raise_exception=False)


class Wrong(HessianFreeKKT):
    """A solver whose implicit term is changed as a whole, or whose adjoint is."""

    def __init__(self, change=lambda g: g, adjoint=None):
        super().__init__()
        self.change, self.own = change, adjoint

    def implicit_term(self, attacked, v):
        return {n: None if g is None else self.change(g) for n, g in super().implicit_term(attacked, v).items()}

    def adjoint(self, problem, model, solution, v):
        if self.own is None:
            return super().adjoint(problem, model, solution, v)
        return self.own(self.active(problem.lower, model, solution), v, solution.lam)


WRONG_SOLVERS = {
    "zero": (ZeroIG(), "implicit term missing", "no implicit term"),
    "sign": (Wrong(lambda g: -g), "sign", "minus"),
    "nine tenths": (Wrong(lambda g: 0.9 * g), "factor", "0.9 times the right one"),
    "a thousandth": (Wrong(lambda g: 1.01 * g), "factor", "1.01 times"),
    "ig_weight": (HessianFreeKKT(ig_weight=0.1), "factor", "as ig_weight=0.1 says"),
    "a sum": (Wrong(lambda g: 4 * g), "factor", "4 (B, the size of the batch)"),
    "no λ": (Wrong(lambda g: 2.5 * g), "factor", "2.5 (λ)"),
    "λ multiplied": (Wrong(lambda g: 6.25 * g), "factor", "6.25 (λ²)"),
    "no mask": (Wrong(adjoint=lambda active, v, lam: v / lam), "mask", "without the mask"),
    "inverse mask": (Wrong(adjoint=lambda a, v, lam: (v - a.tangent(v)) / lam), "mask", "not free"),
    "at δ*": (HessianFreeKKT(cross_at="solution"), "cross derivative at δ*", "at δ* in place of z"),
}


@pytest.mark.parametrize("name", WRONG_SOLVERS)
def test_a_wrong_solver_is_named(name):
    solver, cause, words = WRONG_SOLVERS[name]
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    problem = taylor(0.03, 0.4)
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch)
    report = hypergradreport(problem, solver, model, batch)
    assert not report.passed and report.cause == cause, str(report)
    assert words in report.explanation, str(report)


def test_a_solver_that_forgets_curvature_is_named():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    report = hypergradreport(proximal(2.0), HessianFreeKKT(), model, batch)
    assert report.cause == "Hessian" and "λI in place of the Hessian" in report.explanation
    sphere = ba.BilevelProblem(ba.UpperProblem(), ba.Linearized(ATK, ba.L2Ball(0.2), "zero", "taylor", 3.0))
    assert hypergradcheck(sphere, HessianFreeKKT(), model, batch)
    flat = Wrong(adjoint=lambda active, v, lam: active.tangent(v) / lam)
    report = hypergradreport(sphere, flat, model, batch)
    assert report.cause == "boundary" and "μ" in report.explanation


def test_nothing_free_is_not_passed_over():
    """Published Fast-BAT's step of 5000/255 leaves next to nothing free: ZeroIG passed, and nothing was checked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)).double()
    batch = batch_of(4, 64, classes=10)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(HypergradError) as error:
        hypergradcheck(fastbat.problem(), ZeroIG(), model, batch, generator=generator)
    assert error.value.cause in ("vacuous", "implicit term missing")
    bound = taylor(epsilon=0.001, step=100.0)
    for solver in (ZeroIG(), HessianFreeKKT(), FullKKT()):
        with pytest.raises(VacuousCheck, match="0 % of the directions of δ"):
            hypergradcheck(bound, solver, model, batch)
        assert hypergradcheck(bound, solver, model, batch, min_implicit=0)
    report = hypergradreport(bound, ZeroIG(), model, batch)
    assert report.free == 0 and report.implicit_share == 0 and report.cause == "vacuous"
    fixed = ba.BilevelProblem(ba.UpperProblem(), ba.Linearized(ATK, ba.LinfBall(0.1), "zero", "sign", 0.05))
    report = hypergradreport(fixed, ZeroIG(), model, batch)
    assert report.passed and report.implicit_share is None  # δ* does not move with θ: there is no implicit term


def test_a_kink_is_a_kink_and_not_the_solvers_mistake():
    report = hypergradreport(taylor(), HessianFreeKKT(), relu(), batch_of(4, 6))
    assert report.cause == "no derivative" and "ReLU" in report.explanation, str(report)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("n", [2, 5])
def test_batch_normalisation_raises_no_alarm(n, mode):
    """Running statistics are the same in every evaluation: before, they moved from one to the next."""
    problem = taylor(mode=mode)
    model = with_batch_norm()
    before = copy.deepcopy(model.state_dict())
    for solver in (HessianFreeKKT(), FullKKT()):
        assert hypergradcheck(problem, solver, model, batch_of(n, 6), min_implicit=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropout_is_checked_with_the_same_units_dropped():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    assert hypergradcheck(taylor(), HessianFreeKKT(), model, batch_of(4, 6))
    assert not hypergradcheck(taylor(), ZeroIG(), model, batch_of(4, 6), raise_exception=False)
    generator = torch.get_rng_state()
    hypergradcheck(taylor(), HessianFreeKKT(), model, batch_of(4, 6), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), generator)


def test_an_error_of_a_thousandth_in_a_large_network_is_seen():
    """21,210 parameters: along one random direction the error is divided by 145, and was below the tolerance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 190), nn.Tanh(), nn.Linear(190, 10)).double()
    assert sum(p.numel() for p in model.parameters()) > 21_000
    batch, problem = batch_of(4, 100, classes=10), taylor(0.3, 2.0)
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch)
    step = HessianFreeKKT().hypergradient(problem, model, batch)
    weight = 1 + 1e-3 * (step.direct_norm / step.implicit_norm).item()  # 1e-3 of the whole, in the implicit term
    report = hypergradreport(problem, Wrong(lambda g: weight * g), model, batch)
    assert report.cause == "factor"
    assert all(d.agrees for d in report.directions if len(d.along) == 1)  # what was tried before sees nothing


def test_the_report_can_be_read():
    report = hypergradreport(taylor(), HessianFreeKKT(), dense(6, 5, 3), batch_of(4, 6))
    assert report.passed and "agrees with finite differences along" in str(report)
    assert "% of the directions of δ* are free; the implicit term is" in str(report)
    report.raise_for_failure()


def _noticed(s):
    """Whether the right solver passes here, and so wrong ones must not."""
    if activity_margin(s.problem, s.model, s.batch, s.anchor) < 1e-3:
        return False
    right = hypergradreport(s.problem, HessianFreeKKT(), s.model, s.batch, anchor=s.anchor)
    if right.cause == "vacuous":
        return False
    assert right.passed, str(right)
    missing = hypergradreport(s.problem, ZeroIG(), s.model, s.batch, anchor=s.anchor)
    assert missing.cause == "implicit term missing", str(missing)
    weaker = hypergradreport(s.problem, HessianFreeKKT(ig_weight=0.9), s.model, s.batch, anchor=s.anchor)
    assert weaker.cause == "factor" and "0.9 times" in weaker.explanation, str(weaker)
    return True


@pytest.mark.parametrize("kind", ["box", "l2", "polyhedron"])
@pytest.mark.parametrize("pairs", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_wrong_solvers_are_noticed_in_random_problems(kind, pairs):
    """Two wrong solvers, one without its implicit term and one with 0.9 of it, in each of ``pairs`` random problems.

    170 of each kind in the thorough profile, which is 1,020 wrong solvers.
    """
    noticed, pairs = [], 170 if thorough() else pairs
    constraint = {"box": lambda shape: bst.boxes(), "l2": lambda shape: bst.l2_balls(), "polyhedron": bst.polyhedra}

    @settings(max_examples=3 * pairs, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(s=bst.settings_of(bst.linearized, constraint[kind], max_values=8))
    def look(s):
        if sum(noticed) < pairs:
            noticed.append(_noticed(s))

    look()
    assert sum(noticed) == pairs, f"{len(noticed)} tried"


def test_the_page_lists_every_cause():
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    rows = [f"| {name} | {text} |" for name, text in CAUSES.items()]
    assert [line for line in page.splitlines() if line in rows] == rows
