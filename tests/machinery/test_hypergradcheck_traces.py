"""hypergradcheck among code that does the unexpected: nothing is left changed, and no crash hides the verdict."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from networks import ATK, batch_of, dense, taylor, with_batch_norm
from test_hypergradcheck_causes import Wrong
from torch import nn
from wrong_problems import OwnLower, own, upper

import bilevel_at as ba
from bilevel_at.solvers import HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck, hypergradreport


def dropout():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def with_one_entry(value):
    def change(g):
        g = g.clone()
        g.flatten()[0] = value
        return g

    return Wrong(change)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e200])
def test_an_entry_that_is_not_finite_or_enormous_does_not_pass(value):
    report = hypergradreport(taylor(), with_one_entry(value), dense(6, 5, 3), batch_of(4, 6))
    assert not report.passed and (report.cause == "not finite") == (value != 1e200), str(report)


def reassigns(model, batch, delta):
    model[1].weight.data = model[1].weight.data / model[1].weight.data.norm()


def to_eval(model, batch, delta):
    model.eval()


def freezes(model, batch, delta):
    model[4].bias.requires_grad_(False)


def wants_gradients(model, batch, delta):
    batch.x.requires_grad_(True)


@pytest.mark.parametrize("term", [reassigns, to_eval, freezes, wants_gradients])
def test_what_a_loss_does_to_the_caller_is_named_and_undone(term):
    model, batch = dropout(), batch_of(4, 6)
    weight, values = model[1].weight.data, model[1].weight.detach().clone()
    report = hypergradreport(upper(term), HessianFreeKKT(), model, batch)
    assert report.cause == "edit in place", str(report)
    assert model.training and model[3].training and not batch.x.requires_grad
    assert all(p.requires_grad for p in model.parameters())
    assert model[1].weight.data_ptr() == weight.data_ptr() and torch.equal(model[1].weight, values)


class Interrupting(ba.UpperProblem):
    """Edits x at once and raises at its ``last`` call."""

    def __init__(self, last):
        super().__init__()
        self.left = last

    def loss_at(self, model, batch, solution, generator=None):
        self.left -= 1
        torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002
        if self.left == 0:
            batch.x.add_(1e-4)
            raise KeyboardInterrupt
        return super().loss_at(model, batch, solution, generator)


@pytest.mark.parametrize("last", [1, 2, 3, 5, 9, 15])
def test_an_interruption_leaves_everything_as_it_was(last):
    model, batch = with_batch_norm(), batch_of(4, 6)
    problem = ba.BilevelProblem(Interrupting(last), taylor().lower)
    generator = torch.Generator().manual_seed(5)

    def everything():
        values = [*model.state_dict().values(), batch.x, torch.get_rng_state(), generator.get_state()]
        return [value.clone() for value in values], random.getstate(), str(np.random.get_state())  # noqa: NPY002

    before = everything()
    with pytest.raises(KeyboardInterrupt):
        hypergradcheck(problem, HessianFreeKKT(), model, batch, generator=generator)
    after = everything()
    same = [torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)]
    assert all(same[:-1]) and before[1:] == after[1:]


class Embedded(ba.Linearized):
    """δ is added behind a network's first, normalising, layers."""

    def base(self, model, batch):
        return model[:3](batch.x).detach()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_statistics_of_what_delta_is_added_to_stay(mode):
    def loss(model, batch, delta):
        return torch.nn.functional.cross_entropy(model[3:](model[:3](batch.x) + delta), batch.y, reduction="none")

    model = with_batch_norm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lower = Embedded(ba.minus(loss), ba.LinfBall(0.3, bounds=None), "zero", "taylor", 0.5, mode=mode)
    problem = ba.BilevelProblem(ba.UpperProblem(loss), lower)
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch_of(4, 6), min_implicit=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_mask_where_nothing_is_free_is_a_mask():
    unmasked = Wrong(adjoint=lambda active, v, lam: v / lam)
    report = hypergradreport(taylor(0.001, 100.0), unmasked, dense(6, 5, 3), batch_of(4, 6))
    assert report.cause == "mask", str(report)


def test_one_layer_without_its_term_is_named():
    class Partly(HessianFreeKKT):
        def implicit_term(self, attacked, v):
            return {**super().implicit_term(attacked, v), "1.weight": None}

    report = hypergradreport(taylor(), Partly(), dense(6, 5, 3), batch_of(4, 6))
    assert report.cause == "some parameters" and report.explanation.endswith("right but for 1.weight")


def test_a_mean_beside_batch_statistics_is_coupled():
    def loss(model, batch, delta):
        return ATK(model, batch, delta).mean()

    lower = ba.Linearized(loss, ba.LinfBall(0.3), "zero", "taylor", 0.5, mode="train")
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    assert hypergradcheck(problem, HessianFreeKKT(), with_batch_norm(), batch_of(4, 6), min_implicit=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_is_the_network_s_and_noise_beside_it_is_not(training, mode):
    assert hypergradcheck(
        taylor(mode=mode), HessianFreeKKT(), dropout().train(training), batch_of(4, 6), min_implicit=0
    )
    noisy = upper(lambda model, batch, delta: 1e-3 * torch.randn(()).item())
    report = hypergradreport(noisy, HessianFreeKKT(), dropout().train(training), batch_of(4, 6))
    assert report.cause == "hidden randomness", str(report)


class Careless(ba.Start):
    def fresh(self, constraint, base, generator):
        return 0.1 * torch.rand_like(base)


def test_an_anchor_that_ignores_the_generator_is_named():
    lower = ba.Linearized(ATK, ba.LinfBall(0.3), Careless(), "taylor", 0.5)
    report = hypergradreport(
        ba.BilevelProblem(ba.UpperProblem(), lower), HessianFreeKKT(), dense(6, 5, 3), batch_of(4, 6)
    )
    assert report.cause == "hidden randomness" and "the anchor" in report.explanation


def test_a_detached_perturbation_is_named():
    loss = ba.UpperProblem(lambda model, batch, delta: ba.cross_entropy(model, batch, delta.detach()))
    report = hypergradreport(ba.BilevelProblem(loss, taylor().lower), HessianFreeKKT(), dense(6, 5, 3), batch_of(4, 6))
    assert report.cause == "upper term without δ", str(report)


def test_half_precision_inside_is_named():
    loss = ba.UpperProblem(lambda model, batch, delta: ba.cross_entropy(model, batch, delta).float())
    report = hypergradreport(ba.BilevelProblem(loss, taylor().lower), HessianFreeKKT(), dense(6, 5, 3), batch_of(4, 6))
    assert report.cause == "precision", str(report)


def test_a_short_step_is_told_to_be_longer():
    report = hypergradreport(taylor(step=1e-4), HessianFreeKKT(), dense(6, 5, 3), batch_of(4, 6))
    assert report.cause == "vacuous" and "longer step" in report.explanation


def test_a_verdict_survives_a_problem_that_cannot_be_asked():
    class Silent(OwnLower):
        def objective(self, model, batch, delta, anchor):
            raise ZeroDivisionError("not today")

    report = hypergradreport(own(Silent()), HessianFreeKKT(ig_weight=0.5), dense(6, 5, 3), batch_of(4, 6))
    assert report.cause == "factor" and "0.5" in report.explanation


def test_problems_without_a_constraint_are_checked():
    class Free(ba.LowerProblem):
        constraint = None

        def solve_at(self, model, batch, anchor, differentiable):
            return ba.Solution(0.1 * batch.x, anchor, batch)

    problem = ba.BilevelProblem(ba.UpperProblem(), Free(), threat=ba.LinfBall(0.1))
    z = torch.zeros(4, 6, dtype=torch.float64)
    assert hypergradcheck(problem, ZeroIG(), dense(6, 5, 3), batch_of(4, 6), anchor=z)


@pytest.mark.parametrize("more", [{"eps": 0.0}, {"mode": "Full"}, {"directions": 0}])
def test_arguments_are_checked(more):
    with pytest.raises(ba.InputError, match=next(iter(more))):
        hypergradcheck(taylor(), HessianFreeKKT(), dense(6, 5, 3), batch_of(4, 6), **more)
