"""Steps: constants, schedules, and adaptive steps, which observing alone changes."""

from __future__ import annotations

import math

import pytest
import torch
from networks import ATK, F64, batch_of, dense
from transcriptions import ce_gradient, clip

import bilevel_at as ba
from bilevel_at.solvers import ZeroIG
from bilevel_at.steps import step_policy


def indexed(*index):
    return batch_of(len(index), 6).replace(index=torch.tensor(index))


def problem_of(step, direction="sign", epsilon=0.3):
    lower = ba.Linearized(ATK, ba.LinfBall(epsilon), "zero", direction, step)
    return ba.BilevelProblem(ba.UpperProblem(), lower)


def squares(model, batch):
    """‖∇ℓ‖² at z = 0, per sample."""
    return ce_gradient(model, batch.x, batch.y).square().sum(1)


def test_adaptive_steps_are_equations_3_and_4():
    model, step = dense(6, 5, 3), ba.Adaptive(gamma=0.2, c=0.5, beta=0.7)
    problem = problem_of(step)
    v = torch.zeros(6, dtype=F64)
    for visit in ((3, 0), (0, 5), (3, 5)):
        batch = indexed(*visit)
        taken = ZeroIG().backward(problem, model, batch)
        v[list(visit)] = 0.7 * v[list(visit)] + 0.3 * squares(model, batch)
        torch.testing.assert_close(taken.solution.lam, (0.5 + v[list(visit)].sqrt()) / 0.2)
    rows = step.memory.read(indexed(0, 1, 2, 3, 4, 5), torch.full((6,), -1.0, dtype=F64))
    assert (rows[[1, 2, 4]] == -1).all()  # never observed
    torch.testing.assert_close(rows[[0, 3, 5]], v[[0, 3, 5]])


def test_adaptive_steps_change_by_observing_alone():
    model, step, batch = dense(6, 5, 3), ba.Adaptive(gamma=0.2, c=0.5), indexed(2, 0)
    problem, gradient = problem_of(step), torch.ones(2, 6, dtype=F64)
    first = step.size(batch, gradient)
    assert torch.equal(step.size(batch, gradient), first) and step.memory.values is None
    problem.lower.solve(model, batch)
    result = ZeroIG().hypergradient(problem, model, batch)
    assert step.memory.values is None
    step.observe(result)
    torch.testing.assert_close(step.memory.read(batch, torch.zeros(2, dtype=F64)), 0.5 * squares(model, batch))
    assert not torch.equal(step.size(batch, gradient), first)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.05), (0.3, math.inf), (0.1, 0.1)])
def test_adaptive_steps_are_clipped(low, high):
    model, batch = dense(6, 5, 3), indexed(2, 0)
    step = ba.Adaptive(gamma=0.2, c=0.5, low=low, high=high)
    lam = problem_of(step).lower.solve(model, batch).lam
    expected = (0.2 / (0.5 + (0.5 * squares(model, batch)).sqrt())).clamp(low, high)
    torch.testing.assert_close(1 / lam, expected)
    assert ((1 / lam - low).abs().min() < 1e-9) or ((1 / lam - high).abs().min() < 1e-9)  # clipped indeed


@pytest.mark.parametrize("follow", [False, True])
def test_v_begins_after_the_warm_up_or_with_it(follow):
    model, batch = dense(6, 5, 3), indexed(2, 0)
    step = ba.Adaptive(gamma=0.2, c=0.5, warmup_step=0.07, warmup_epochs=2, follow_warmup=follow)
    problem, v = problem_of(step), torch.zeros(2, dtype=F64)
    for epoch in range(4):
        problem.set_epoch(epoch, 4)
        assert step.warming_up == (epoch < 2)
        solution = ZeroIG().backward(problem, model, batch).solution
        if follow or epoch >= 2:
            v = 0.5 * v + 0.5 * squares(model, batch)
        expected = 1 / 0.07 if epoch < 2 else (0.5 + v.sqrt()) / 0.2
        torch.testing.assert_close(torch.as_tensor(solution.lam, dtype=F64), torch.as_tensor(expected, dtype=F64))
        torch.testing.assert_close(step.memory.read(batch, torch.zeros(2, dtype=F64)), v)


def test_a_missing_index_is_noticed_in_the_warm_up_already():
    step = ba.Adaptive(gamma=0.2, c=0.5, warmup_step=0.07, warmup_epochs=2)
    with pytest.raises(ba.InputError, match=r"pass Batch\(x, y, index=...\)"):
        problem_of(step).lower.solve(dense(6, 5, 3), batch_of(2, 6))


def test_a_schedule_is_a_step():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    problem = problem_of(ba.Schedule(lambda epoch, epochs: 0.1 * (epoch + 1) / epochs), "taylor")
    gradient = ce_gradient(model, batch.x, batch.y)
    for epoch, epochs in ((0, 2), (1, 2), (3, 10)):
        problem.set_epoch(epoch, epochs)
        expected = 0.1 * (epoch + 1) / epochs
        solution = problem.lower.solve(model, batch)
        assert solution.lam == pytest.approx(1 / expected)
        torch.testing.assert_close(solution.delta, clip(expected * gradient, batch.x, 0.3))
    assert problem.state_dict() == {}  # the epoch says it all


def test_steps_of_an_anchor_follow_the_schedule_too():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    step = ba.Schedule(lambda epoch, epochs: 0.02 * (epoch + 1))
    lower = ba.Linearized.pgd(ATK, ba.LinfBall(0.3), 3, step, "zero")
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    for epoch in (0, 1):
        problem.set_epoch(epoch, 2)
        delta = torch.zeros_like(batch.x)
        for _ in range(3):
            sign = ce_gradient(model, batch.x + delta, batch.y).sign()
            delta = clip(delta + 0.02 * (epoch + 1) * sign, batch.x, 0.3)
        torch.testing.assert_close(lower.solve(model, batch).delta, delta)


def test_a_schedule_that_is_no_step_is_named():
    problem = problem_of(ba.Schedule(lambda epoch, epochs: 0.1 * (1 - epoch)))
    problem.lower.solve(dense(6, 5, 3), batch_of(2, 6))
    problem.set_epoch(1, 2)
    with pytest.raises(ba.InputError, match="step is 0; it must be a positive finite number"):
        problem.lower.solve(dense(6, 5, 3), batch_of(2, 6))


def test_a_step_for_each_sample_of_one_batch():
    model, batch = dense(6, 5, 3), batch_of(2, 6)
    sizes = torch.tensor([0.1, 0.2], dtype=F64)
    solution = problem_of(ba.Constant(sizes), "taylor").lower.solve(model, batch)
    gradient = ce_gradient(model, batch.x, batch.y)
    torch.testing.assert_close(solution.delta, clip(sizes[:, None] * gradient, batch.x, 0.3))
    with pytest.raises(ba.InputError, match="step has values down to -0.1; every step must be positive"):
        ba.Constant(torch.tensor([0.1, -0.1]))


def test_a_policy_is_taken_as_it_is():
    own = ba.Adaptive(1.0, 1.0)
    assert step_policy(own) is own and step_policy(0.5).value == 0.5

    class Own(ba.Step):
        """Half a pixel over the gradient's greatest entry."""

        def size(self, batch, gradient):
            return 0.5 / gradient.flatten(1).abs().amax(1)

    model, batch = dense(6, 5, 3), batch_of(3, 6)
    lower = ba.Linearized(ATK, ba.Range(None), "zero", "taylor", Own())
    torch.testing.assert_close(lower.solve(model, batch).delta.abs().amax(1), torch.full((3,), 0.5, dtype=F64))
    with pytest.raises(NotImplementedError, match=r"Step does not define size\(batch, gradient\)"):
        ba.Step().size(batch, batch.x)
