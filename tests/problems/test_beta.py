"""BETA: equations 20 to 22."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import given
from transcriptions import (
    assert_same,
    beta_rates,
    beta_starts,
    beta_steps,
    ce,
    descend_on,
    library_step,
    rmsprop_margins,
    scenes,
    seeded,
)

import bilevel_at as ba
from bilevel_at.problems import beta, smooth_beta
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG


@examples(0.3)
@given(s=scenes(max_size=3), steps=beta_steps, rate=beta_rates)
def test_beta(s, steps, rate):
    """Equations 20 to 22: the best class's perturbation, and cross-entropy there."""
    problem = beta.problem(s.epsilon, steps, rate)
    taken = library_step(problem, beta.solver(), s.model, s.batch, s.lr, seeded(s.seed))
    attacks = rmsprop_margins(s.twin, s.x, s.y, beta_starts(s), steps, rate, s.epsilon)
    best = [max(row, key=lambda one: one[1]) for row in attacks]
    delta = torch.cat([eta for eta, _, _ in best])
    assert taken.solution.batch.more["target"].tolist() == [j for _, _, j in best]
    torch.testing.assert_close(taken.solution.delta, delta, rtol=1e-8, atol=1e-11)
    descend_on(s.twin, ce(s.twin, s.x + delta, s.y).mean(), s.lr)
    assert_same(s.model, s.twin, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("variant", [beta, smooth_beta])
@pytest.mark.parametrize(
    "solver", [ZeroIG(), HessianFreeKKT(damping=5.0), FullKKT(damping=50.0), FullKKT("cg", damping=50.0)]
)
def test_every_solver_runs_both_variants(variant, solver):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    batch = ba.Batch(torch.rand(3, 6), torch.tensor([0, 3, 1]))
    # steps far below ε, so that coordinates are left between the bounds
    step = solver.backward(variant.problem(epsilon=0.1, steps=2, step=0.002), model, batch)
    assert step.loss.isfinite()
    assert (step.implicit_norm > 0) == (not isinstance(solver, ZeroIG))


def test_bad_arguments_are_named():
    with pytest.raises(ba.InputError, match="optim 'Momentum' is not an optimiser of torch.optim"):
        beta.problem(optim="Momentum")
    with pytest.raises(ba.InputError, match="steps is 0"):
        beta.problem(steps=0)
    with pytest.raises(ba.InputError, match="temperature is 0"):
        smooth_beta.problem(temperature=0.0)
