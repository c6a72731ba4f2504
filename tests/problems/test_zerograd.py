"""ZeroGrad and MultiGrad: which signs of the gradient a step follows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_loops import (
    EPS,
    assert_same,
    batches,
    cross_entropy,
    descend,
    follow,
    grad,
    in_ball,
    in_range,
    network,
    noise,
    one_hot,
)

import bilevel_at as ba
from bilevel_at.problems import zerograd
from bilevel_at.solvers import HessianFreeKKT


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_zerograd(smoothing):
    model, twin = network(), network()
    follow(zerograd.problem(EPS, quantile=0.35, label_smoothing=smoothing), model)

    generator = torch.Generator().manual_seed(7)
    for batch in batches(3):
        x, targets = batch.x, one_hot(batch.y, 1 - smoothing + smoothing / 3, smoothing / 3)
        z = in_range(noise(x, EPS, generator), x).requires_grad_()
        slope = grad(cross_entropy(twin(x + z), targets).sum(), z)
        for row in slope:
            row[row.abs() < torch.quantile(row.abs(), 0.35)] = 0
        assert 0 < (slope == 0).double().mean() < 0.5
        delta = in_ball(z.detach() + 2 * EPS * slope.sign(), x)
        descend(twin, cross_entropy(twin(x + delta), targets).mean())
    assert_same(model, twin)


@pytest.mark.parametrize(("draws", "agree"), [(3, 3), (5, 4), (3, 2)])
def test_multigrad(draws, agree):
    model, twin = network(), network()
    follow(zerograd.problem(EPS, "multigrad", draws=draws, agree=agree), model)

    generator, zeros = torch.Generator().manual_seed(7), 0
    for batch in batches(3):
        x, targets, votes = batch.x, one_hot(batch.y), torch.zeros_like(batch.x)
        starts = [in_range(noise(x, EPS, generator), x) for _ in range(draws)]
        for z in starts:
            z.requires_grad_()
            votes += grad(cross_entropy(twin(x + z), targets).sum(), z).sign()
        votes[votes.abs() < 2 * agree - draws] = 0
        zeros += (votes == 0).sum()
        delta = in_ball(2 * EPS * votes.sign(), x)
        descend(twin, cross_entropy(twin(x + delta), targets).mean())
    assert_same(model, twin)
    assert (zeros > 0) == (agree > draws / 2 + 0.5)  # of three signs two always agree


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=3), st.floats(0, 1))
def test_quantiles_are_interpolated_as_by_torch(rows, q):
    values = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(zerograd.row_quantile(values, q), torch.quantile(values, q, dim=1))


def test_multigrad_is_the_minimiser_of_its_objective_with_no_derivative_in_theta():
    model, batch = network().eval(), next(batches(1))
    problem = zerograd.problem(EPS, "multigrad", step=0.5 * EPS, mode="eval")
    step = HessianFreeKKT().hypergradient(problem, model, batch, generator=torch.Generator().manual_seed(7))
    assert step.implicit_norm == 0
    lower, solution = problem.lower, step.solution

    def objective(delta):
        return lower.objective(model, solution.batch, delta, solution.anchor)

    delta = solution.delta.clone().requires_grad_()
    torch.testing.assert_close(grad(objective(delta).sum(), delta), solution.gradient)
    for seed in range(5):
        other = lower.constraint.sample(batch.x, torch.Generator().manual_seed(seed))
        assert (objective(other) >= objective(solution.delta)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantile": 1.5}, "quantile is 1.5; it must be from 0 to 1"),
        ({"variant": "manygrad"}, "variant is 'manygrad'; choose from 'zerograd', 'multigrad'"),
        ({"variant": "multigrad", "draws": 0}, "draws is 0; it must be a whole number, at least 1"),
        ({"variant": "multigrad", "agree": 4}, "agree is 4; of 3 signs from 2 to 3 can agree"),
        ({"variant": "multigrad", "agree": 1}, "agree is 1; of 3 signs from 2 to 3 can agree"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ba.InputError, match=message):
        zerograd.problem(EPS, **arguments)


def test_quantiles_by_data_set():
    recipes = zerograd.recipe()
    stated = {name: recipes[name].problem.get("quantile") for name in ("cifar10", "cifar100", "svhn")}
    assert stated == {"cifar10": None, "cifar100": 0.45, "svhn": 0.7}  # the default on CIFAR-10
    assert zerograd.problem.__defaults__[2] == 0.35
