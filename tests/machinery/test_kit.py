"""assert_feasible, assert_kkt and assert_reproducible: what is right passes, what is wrong is named."""

from __future__ import annotations

import pytest
import torch
from networks import ATK, batch_of, dense, proximal, taylor
from wrong_problems import WRONG, OwnLower, StepsTooShort, Unprojected, WrongSign, own

import bilevel_at as ba
from bilevel_at.problems import atas, fastbat, minmax, nfgsm
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG
from bilevel_at.testing import assert_feasible, assert_kkt, assert_reproducible

CAUSES = ("hidden randomness", "hidden state", "edit in place", "fills .grad")
IMPURE = [name for name, (cause, _, _) in WRONG.items() if cause in CAUSES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("problem", [taylor(), proximal(), own(OwnLower()), fastbat.problem(), minmax.problem()])
def test_what_is_right_passes(problem, dtype):
    model, batch = dense(6, 5, 3).to(dtype), batch_of(4, 6)
    batch = ba.Batch(batch.x.to(dtype), batch.y)
    assert_feasible(problem, model, batch)
    assert_kkt(problem, model, batch)
    assert_reproducible(problem, HessianFreeKKT(), model, batch)


def test_what_is_remembered_stays():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    batch = ba.Batch(batch.x, batch.y, torch.arange(4))
    problem = ba.BilevelProblem(ba.UpperProblem(), ba.Linearized(ATK, ba.LinfBall(0.2), "remembered", "taylor", 0.5))
    ZeroIG().backward(problem, model, batch)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert_reproducible(problem, FullKKT(), model, batch, generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert_reproducible(nfgsm.problem(), ZeroIG(), model, batch)
    assert_reproducible(atas.problem(), ZeroIG(), model, ba.Batch(batch.x, batch.y, torch.arange(4), examples=4))


def test_what_is_wrong_is_named_with_its_samples():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    with pytest.raises(AssertionError, match=r"outside its constraint on samples 0, 1, 2, 3: .* allowed 1\.49e-08"):
        assert_feasible(own(Unprojected()), model, batch)
    for lower in (WrongSign(), StepsTooShort()):
        assert_feasible(own(lower), model, batch)
        with pytest.raises(AssertionError, match="does not minimise g over its constraint on sample"):
            assert_kkt(own(lower), model, batch)


@pytest.mark.parametrize("name", IMPURE)
def test_what_is_no_function_of_its_arguments_is_named(name):
    cause, words, problem = WRONG[name]
    with pytest.raises(AssertionError, match=f"^{cause}: .*{words}"):
        assert_reproducible(problem(), HessianFreeKKT(), dense(6, 5, 3), batch_of(4, 6))


def test_an_attack_that_remembers_while_it_solves_is_named():
    class Drifting(OwnLower):
        def solve_at(self, model, batch, anchor, differentiable):
            self.lam = self.lam + 0.5
            return super().solve_at(model, batch, anchor, differentiable)

    with pytest.raises(AssertionError, match="hidden state: .* lower.lam, from"):
        assert_reproducible(own(Drifting()), HessianFreeKKT(), dense(6, 5, 3), batch_of(4, 6))
