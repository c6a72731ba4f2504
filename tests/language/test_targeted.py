"""One problem per class: feasible, the best class, any optimiser."""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

import bilevel_at as ba
from bilevel_at.solvers import ZeroIG
from bilevel_at.testing import strategies as bst

OPTIMISERS = [torch.optim.RMSprop, torch.optim.Adam, torch.optim.SGD, torch.optim.LBFGS, torch.optim.Adagrad]


def margins(model, x, y):
    """M_j = f_j − f_y, with j = y left at −∞."""
    out = model(x)
    M = out - out[torch.arange(len(y)), y][:, None]
    M[torch.arange(len(y)), y] = -torch.inf
    return M


@pytest.mark.parametrize("optimizer", OPTIMISERS, ids=lambda o: o.__name__)
@examples(0.3)
@given(data=st.data())
def test_beta_stays_inside_and_takes_the_best_class(optimizer, data):
    shape, classes = data.draw(bst.shapes(8)), data.draw(st.integers(2, 4))
    model = data.draw(bst.smooth_models(shape, classes))
    batch = data.draw(bst.batches(shape, classes))
    ball = data.draw(st.one_of(bst.boxes(), bst.l2_balls()))
    lower = ba.Targeted(ball, optimizer=optimizer, steps=3, step=data.draw(st.floats(0.01, 1.0)))
    seed = data.draw(bst.seeds)
    best = lower.solve(model, batch, generator=torch.Generator().manual_seed(seed))
    every = ba.Targeted(ball, optimizer=optimizer, steps=3, step=lower.step, keep="all").solve(
        model, batch, generator=torch.Generator().manual_seed(seed)
    )
    for delta, x in ((best.delta, batch.x), (every.delta, batch.repeat(classes - 1).x)):
        torch.testing.assert_close(ball.project(delta, x), delta, rtol=0, atol=1e-9)

    each = classes - 1
    for i in range(len(batch)):
        rows = slice(i * each, (i + 1) * each)
        targets = every.batch.more["target"][rows]
        assert targets.tolist() == [j for j in range(classes) if j != batch.y[i]]
        M = (
            margins(model, batch.x[i] + every.delta[rows], batch.y[i].expand(each))
            .gather(1, targets[:, None])
            .squeeze(1)
        )
        j = M.argmax()
        assert best.batch.more["target"][i] == targets[j]
        torch.testing.assert_close(best.delta[i], every.delta[rows][j])


def test_each_class_is_the_separate_problem_of_algorithm_1():
    """RMSprop on one class and one sample at a time gives the same perturbations as all at once."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)
    ).double()
    batch = ba.Batch(torch.rand(3, 6, dtype=torch.float64), torch.tensor([0, 3, 1]))
    lower = ba.Targeted(ba.LinfBall(0.2), steps=5, step=0.05, keep="all")
    together = lower.solve(model, batch, generator=torch.Generator().manual_seed(0))
    rows = zip(together.delta, together.anchor, together.batch.more["target"], strict=True)
    for row, (delta, z, target) in enumerate(rows):
        x, y = batch.x[row // 3], batch.y[row // 3]
        eta = z.clone().requires_grad_()
        optimizer = torch.optim.RMSprop([eta], lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            out = model((x + eta)[None])[0]
            (-(out[target] - out[y])).backward()
            optimizer.step()
            with torch.no_grad():
                eta.copy_(torch.minimum(torch.maximum(eta.clamp(-0.2, 0.2), -x), 1 - x))
        torch.testing.assert_close(delta, eta.detach())


def test_beta_beats_the_untargeted_margin_step_for_step():
    """More steps never make the reached margin much worse, and 20 steps beat the random start clearly."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
    batch = ba.Batch(torch.rand(32, 16), torch.randint(0, 5, (32,)))
    lower = ba.Targeted(ba.LinfBall(0.1), steps=20, step=0.02)
    solution = lower.solve(model, batch, generator=torch.Generator().manual_seed(0))
    reached = ba.negative_margin(model, batch, solution.delta)
    start = ba.negative_margin(model, batch, lower.constraint.sample(batch.x, torch.Generator().manual_seed(0)))
    assert (reached > start).all()


def test_a_solution_is_found_again_from_its_batch_and_anchor():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)
    ).double()
    batch = ba.Batch(torch.rand(64, 6, dtype=torch.float64), torch.randint(0, 5, (64,)))
    for keep in ("best", "all"):
        lower = ba.Targeted(ba.LinfBall(0.1), steps=3, step=0.01, keep=keep)
        first = lower.solve(model, batch)
        again = lower.solve(model, first.batch, anchor=first.anchor)
        assert torch.equal(first.delta, again.delta)
        assert torch.equal(first.batch.more["target"], again.batch.more["target"])


class EveryClass(ba.UpperProblem):
    """Cross-entropy under every class's perturbation."""

    def loss_at(self, model, batch, solution, generator=None):
        return ba.cross_entropy(model, solution.batch, solution.delta).reshape(len(batch), -1).mean(1)


def test_remembered_perturbations_are_kept_per_class():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4)).double()
    batch = ba.Batch(torch.rand(3, 6, dtype=torch.float64), torch.tensor([0, 1, 2]), torch.tensor([4, 0, 2]))
    lower = ba.Targeted(ba.LinfBall(0.1), steps=2, step=0.01, keep="all", anchor="remembered")
    problem = ba.BilevelProblem(EveryClass(), lower)
    first = ZeroIG().backward(problem, model, batch).solution
    second = ZeroIG().backward(problem, model, batch).solution
    assert torch.equal(second.anchor, first.delta)
    aimed = lower.solve(model, batch.replace(target=torch.tensor([3, 0, 3])))  # the same memory, by class
    rows = [
        3 * i + [j for j in range(4) if j != y].index(t)
        for i, (y, t) in enumerate(zip([0, 1, 2], [3, 0, 3], strict=True))
    ]
    assert torch.equal(aimed.anchor, second.delta[rows])
