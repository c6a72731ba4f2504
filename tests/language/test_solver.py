"""What all solvers share: accumulation, scalers, autocast, precision, frozen and unused parameters, forward passes."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import ATK, SOLVERS, batch_of, dense, network, proximal, taylor, with_batch_norm
from torch import nn

import bilevel_at as ba
from bilevel_at.problems import fastat, fastbat, minmax
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ValueFunction, ZeroIG


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FullKKT(method="lu"), "method is 'lu'"),
        (lambda: FullKKT(curvature="upper"), "curvature is 'upper'"),
        (lambda: FullKKT(damping=-1.0), "damping is -1; it must be a finite number, at least 0"),
        (lambda: HessianFreeKKT(ig_weight=float("nan")), "ig_weight is nan"),
        (lambda: HessianFreeKKT(cross_at="middle"), "cross_at is 'middle'"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ba.InputError, match=message):
        make()


def test_backward_accumulates_like_loss_backward():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    solver, problem = HessianFreeKKT(), taylor()
    once = solver.backward(problem, model, batch)
    assert all(torch.equal(p.grad, once.grads[n]) for n, p in model.named_parameters())
    solver.backward(problem, model, batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once.grads[name])
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    # and the returned gradients are not the ones an optimiser or clipping then changes
    step = solver.backward(problem, model, batch)
    before = {n: g.clone() for n, g in step.grads.items()}
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    assert all(torch.equal(step.grads[n], before[n]) for n in before)


def test_frozen_and_unused_parameters_are_as_torch_has_them():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.frozen, self.unused = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(2, 2)
            self.tied = self.used
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(torch.tanh(self.used(x)))

    model = Partly().double()
    for solver in SOLVERS:
        model.zero_grad()
        step = solver.backward(taylor(step=0.005), model, batch_of(3, 6))
        assert set(step.grads) == {"used.weight", "used.bias", "unused.weight", "unused.bias"}
        assert step.grads["unused.weight"] is None and model.unused.weight.grad is None
        assert model.frozen.weight.grad is None and model.used.weight.grad is not None
    model.requires_grad_(False)
    with pytest.raises(ba.InputError, match="no parameter of the model requires a gradient"):
        ZeroIG().backward(taylor(), model, batch_of(3, 6))


def test_works_under_no_grad_and_leaves_the_batch_alone():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    expected = FullKKT().hypergradient(proximal(), model, batch)
    with torch.no_grad():
        got = FullKKT().hypergradient(proximal(), model, batch)
    for name in expected.grads:
        torch.testing.assert_close(got.grads[name], expected.grads[name])
    assert not batch.x.requires_grad and batch.x.grad is None
    assert not got.solution.delta.requires_grad and not got.loss.requires_grad


def test_grad_scaler_unscales_to_the_same_gradient():
    """A scaler on the CPU: scaled .grad, and the optimiser's step is that without one."""
    batch, problem = batch_of(4, 6), taylor()
    results = []
    for scale in (None, 1024.0):
        model = dense(6, 5, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if scale is None:
            step = HessianFreeKKT().backward(problem, model, batch)
            optimizer.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            step = HessianFreeKKT().backward(problem, model, batch, scaler=scaler)
            assert model[1].weight.grad.abs().max() > 10 * results[0][0].grads["1.weight"].abs().max()
            scaler.step(optimizer)
            scaler.update()
        results.append((step, [p.detach().clone() for p in model.parameters()]))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(results[0][0].loss, results[1][0].loss)
    torch.testing.assert_close(results[0][0].implicit_norm, results[1][0].implicit_norm)


def test_optimisers_and_schedulers_work_unchanged():
    model, batch = dense(6, 16, 3), batch_of(12, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(HessianFreeKKT(ig_weight=0.1).backward(taylor(epsilon=0.02), model, batch).loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    assert losses[-1] < 0.8 * losses[0]


def test_autocast_gives_float32_gradients_near_the_exact_ones():
    model, batch = dense(6, 32, 3).float(), batch_of(8, 6)
    batch = ba.Batch(batch.x.float(), batch.y)
    exact = HessianFreeKKT().hypergradient(taylor(), copy.deepcopy(model).double(), ba.Batch(batch.x.double(), batch.y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = HessianFreeKKT().hypergradient(taylor(), model, batch)
    got = torch.cat([g.flatten() for g in step.grads.values()])
    want = torch.cat([g.flatten() for g in exact.grads.values()]).float()
    assert got.dtype == torch.float32
    assert (got - want).norm() < 0.05 * want.norm()  # bfloat16 has 8 bits: 0.4 % in each operation


@pytest.mark.parametrize("ball", [ba.L2Ball(2.0), ba.LinfBall(0.2)], ids=["l2", "linf"])
def test_float32_gives_the_float64_hypergradient(ball):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 5))
    x, y = torch.rand(16, 3, 8, 8), torch.randint(0, 5, (16,))
    lower = ba.Linearized(ATK, ball, "zero", "taylor", step=50.0)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    single = HessianFreeKKT().hypergradient(problem, model, ba.Batch(x, y))
    double = HessianFreeKKT().hypergradient(problem, copy.deepcopy(model).double(), ba.Batch(x.double(), y))
    assert single.implicit_norm.item() == pytest.approx(double.implicit_norm.item(), rel=1e-3)
    for name, g in single.grads.items():
        torch.testing.assert_close(g.double(), double.grads[name], rtol=1e-3, atol=1e-5)


class Counting(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x):
        self.calls += 1
        return self.model(x)


@pytest.mark.parametrize(
    ("problem", "solver", "forwards"),
    [
        (fastat.problem(), ZeroIG(), 2),
        (fastat.problem(), HessianFreeKKT(), 2),
        (minmax.problem(steps=5), ZeroIG(), 6),
        (
            fastbat.problem(),
            HessianFreeKKT(),
            3,
        ),  # warm-up, linearisation, upper loss: the implicit term needs no fourth
        (fastbat.problem(anchor="uniform"), HessianFreeKKT(), 2),
        (fastbat.problem(), HessianFreeKKT(cross_at="solution"), 4),
    ],
)
def test_nothing_is_computed_twice(problem, solver, forwards):
    model, x, y = network()
    counting = Counting(model)
    solver.hypergradient(problem, counting, ba.Batch(x, y))
    assert counting.calls == forwards


@pytest.mark.parametrize("solver", [HessianFreeKKT(), FullKKT(), ValueFunction(1e-4)])
def test_the_implicit_term_is_that_of_the_statistics_which_the_attack_has_seen(solver):
    """The upper loss, in train mode, moves them between the attack and its derivative; PyTorch does not notice."""
    still, moving = with_batch_norm(), with_batch_norm()
    still[2].momentum = 0.0
    problem, batch = taylor(mode="eval"), batch_of(4, 6)
    expected = solver.hypergradient(problem, still, batch)
    step = solver.hypergradient(problem, moving, batch)
    assert expected.implicit_norm > 1e-3 * expected.direct_norm
    for name, gradient in expected.grads.items():
        torch.testing.assert_close(step.grads[name], gradient, rtol=1e-12, atol=1e-12)
    assert not torch.equal(still[2].running_mean, moving[2].running_mean)  # and they move on, once
    reference = with_batch_norm()
    reference(batch.x + step.solution.delta)
    assert torch.equal(reference[2].running_mean, moving[2].running_mean)


@pytest.mark.parametrize(("w", "got"), [(lambda v: v.mean(0), r"shape \(6,\)"), (lambda v: None, "a NoneType")])
def test_an_adjoint_of_another_shape_is_refused_by_name(w, got):
    class Mine(HessianFreeKKT):
        def adjoint(self, problem, model, solution, v):
            return w(v)

    with pytest.raises(ba.InputError, match=rf"Mine.adjoint returns {got}; w is .* shaped like δ\*, \(4, 6\)"):
        Mine().hypergradient(taylor(), dense(6, 5, 3), batch_of(4, 6))
