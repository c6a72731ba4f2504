"""AWP: an upper problem whose weights are moved against its loss first."""

from __future__ import annotations

import copy

import pytest
import torch
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
    train,
    update,
)
from torch import nn
from torch.nn import functional as F
from transcriptions import seeded

import bilevel_at as ba
from bilevel_at.problems import awp, fastat, fastbat, gradalign, minmax, nuat, qub, trades
from bilevel_at.problems.awp import AWP
from bilevel_at.solvers import HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck


def plain_moves(proxy, loss, gamma):
    """V for every parameter, from a copy of the network."""
    gradients = torch.autograd.grad(loss, list(proxy.parameters()))
    return [
        gamma * p.detach().norm() * g / g.norm() if p.ndim > 1 else torch.zeros_like(p)
        for p, g in zip(proxy.parameters(), gradients, strict=True)
    ]


def test_the_published_step_on_fast_at():
    """Weights are moved, the step is taken there, and the move is undone: the authors' order, without weight decay."""
    model, twin, gamma = network(), network(), 0.05
    problem = awp.problem(EPS, gamma, of="fastat", moved_decay=0.0)
    follow(problem, model, 3)

    generator = torch.Generator().manual_seed(7)
    for batch in batches(3):
        x, targets = batch.x, one_hot(batch.y)
        z = in_range(noise(x, EPS, generator), x).requires_grad_()
        delta = in_ball(z.detach() + 1.25 * EPS * grad(cross_entropy(twin(x + z), targets).sum(), z).sign(), x)
        proxy = copy.deepcopy(twin)
        moves = plain_moves(proxy, cross_entropy(proxy(x + delta), targets).mean(), gamma)
        update(twin, moves, rate=-1)
        descend(twin, cross_entropy(twin(x + delta), targets).mean())
        update(twin, moves, rate=1)
    assert_same(model, twin)


def test_the_published_step_on_trades():
    """An inner problem with two passes of its own; its weights are moved from epoch 10 on."""
    model, twin, gamma = network(), network(), 0.05
    problem = awp.problem(EPS, gamma, of="trades", gamma_from=10, moved_decay=0.0)
    for epoch in (9, 10):
        problem.set_epoch(epoch, 20)
        follow(problem, model, 2)

    def divergence(clean, moved):
        return (clean.softmax(1) * (clean.log_softmax(1) - moved.log_softmax(1))).sum(1)

    def tradeoff(net, x, delta, targets):
        clean = net(x)
        return (cross_entropy(clean, targets) + 6 * divergence(clean, net(x + delta))).mean()

    for epoch in (9, 10):
        generator = torch.Generator().manual_seed(7)
        for batch in batches(2):
            x, targets = batch.x, one_hot(batch.y)
            delta = 1e-3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
            twin.eval()
            reference = twin(x).detach()
            for _ in range(10):
                at = delta.clone().requires_grad_()
                delta = in_ball(delta + EPS / 4 * grad(divergence(reference, twin(x + at)).sum(), at).sign(), x)
            twin.train()
            proxy = copy.deepcopy(twin)
            moves = plain_moves(proxy, tradeoff(proxy, x, delta, targets), gamma if epoch >= 10 else 0.0)
            update(twin, moves, rate=-1)
            descend(twin, tradeoff(twin, x, delta, targets))
            update(twin, moves, rate=1)
    assert_same(model, twin)


def test_the_published_weight_decay_acts_on_moved_weights():
    """SGD with momentum and weight decay takes its step at θ + V, and the move is undone then."""
    model, twin, gamma, settings = network(), network(), 0.05, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
    problem, ours = (
        awp.problem(EPS, gamma, of="fastat", moved_decay=0.3),
        torch.optim.SGD(model.parameters(), **settings),
    )
    generator = seeded(7)
    for batch in batches(3):
        ours.zero_grad()
        ZeroIG().backward(problem, model, batch, generator)
        ours.step()

    generator, theirs = seeded(7), torch.optim.SGD(twin.parameters(), **settings)
    for batch in batches(3):
        x, targets = batch.x, one_hot(batch.y)
        z = in_range(noise(x, EPS, generator), x).requires_grad_()
        delta = in_ball(z.detach() + 1.25 * EPS * grad(cross_entropy(twin(x + z), targets).sum(), z).sign(), x)
        proxy = copy.deepcopy(twin)
        moves = plain_moves(proxy, cross_entropy(proxy(x + delta), targets).mean(), gamma)
        update(twin, moves, rate=-1)
        theirs.zero_grad()
        cross_entropy(twin(x + delta), targets).mean().backward()
        theirs.step()
        update(twin, moves, rate=1)
    assert_same(model, twin)


class Dropping(ba.UpperProblem):
    """An inner problem that prepares and draws: the cross-entropy on an input with pixels left out, twice."""

    def prepare(self, model, batch, generator):
        return batch.replace(reference=model(batch.x), kept=torch.rand(batch.x.shape, generator=generator) < 0.8)

    def loss_at(self, model, batch, solution, generator=None):
        noise = 0.01 * torch.randn(batch.x.shape, generator=generator, dtype=batch.x.dtype)
        moved = model((batch.x + solution.delta + noise) * batch.more["kept"])
        return F.cross_entropy(moved, batch.y, reduction="none") + (moved - batch.more["reference"]).square().sum(1)


INNER = {
    "fastat": lambda: fastat.problem(EPS),
    "gradalign": lambda: gradalign.problem(EPS),
    "nuat": lambda: nuat.problem(EPS, rise=0.0),
    "qub": lambda: qub.problem(EPS),
    "trades": lambda: trades.problem(EPS, steps=2),
    "prepares and draws": lambda: ba.BilevelProblem(Dropping(), fastat.problem(EPS).lower),
}


@pytest.mark.parametrize("inner", INNER)
def test_without_a_perturbation_it_is_the_inner_problem_bit_for_bit(inner):
    """Weights, running statistics and random draws."""
    plain, moved = network(), network()
    generators = [seeded(7), seeded(7)]
    train(INNER[inner](), ZeroIG(), plain, 3, generators[0])
    problem = INNER[inner]()
    wrapped = ba.BilevelProblem(AWP(problem.upper, 0.0), problem.lower, problem.threat)
    train(wrapped, ZeroIG(), moved, 3, generators[1])
    assert all(torch.equal(a, b) for a, b in zip(moved.state_dict().values(), plain.state_dict().values(), strict=True))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("inner", INNER)
def test_f_is_the_inner_loss_at_moved_weights(inner):
    """Whatever the inner problem prepares, draws and passes: f(θ + V, δ) is its loss of a network that is there."""
    model, batch = network(), next(batches(1))
    problem = INNER[inner]()
    solution = problem.lower.solve(model, batch, generator=seeded(1))
    upper = AWP(problem.upper, 0.05)
    before = [b.clone() for b in model.buffers()]
    moves = upper.perturbation(model, batch, solution, seeded(2))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert set(moves) == {"0.weight", "4.weight"}
    elsewhere = copy.deepcopy(model)
    for name, move in moves.items():
        weight = elsewhere.get_parameter(name)
        torch.testing.assert_close(move.norm(), 0.05 * weight.detach().norm())
        weight.data += move
    ours = upper.loss_at(model, batch, solution, seeded(2))
    draws = seeded(2)
    theirs = problem.upper.loss_at(elsewhere, problem.upper.prepare(elsewhere, batch, draws), solution, draws)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for a, b in zip(model.buffers(), elsewhere.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("inner", sorted(set(INNER) - {"gradalign"}))
def test_the_loss_is_greater_at_moved_weights(inner):
    """V points up the loss, and its length is a share of each weight's."""
    model, batch = network().eval(), next(batches(1))
    problem = INNER[inner]()
    solution = problem.lower.solve(model, batch, generator=seeded(1))
    losses = [AWP(problem.upper, gamma) for gamma in (1e-12, 1e-3, 1e-2)]
    values = [upper.loss_at(model, batch, solution, seeded(2)).mean().item() for upper in losses]
    assert values[0] < values[1] < values[2]


class Held(AWP):
    """V is what it was at the network that this was made with, so that differences of f do not move it."""

    def __init__(self, upper, gamma, moves):
        super().__init__(upper, gamma)
        self.moves = moves

    def perturbation(self, model, batch, solution, generator=None):
        return self.moves


def test_the_jacobian_of_the_attack_is_at_theta():
    """v is at θ + V and the cross derivative at θ, with V constant."""
    model, batch = network().eval(), next(batches(1))
    model[4].weight.data *= 20
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.4, None), "zero", "taylor", 0.3)
    solution = lower.solve(model, batch)
    moves = AWP(ba.UpperProblem(), 0.05).perturbation(model, batch, solution)
    problem = ba.BilevelProblem(Held(ba.UpperProblem(), 0.05, moves), lower)
    assert HessianFreeKKT().hypergradient(problem, model, batch).implicit_norm > 1e-3
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch, rtol=1e-6)


@pytest.mark.parametrize("of", ["minmax", "fastbat"])
def test_the_solver_is_the_inner_files(of):
    file = {"minmax": minmax, "fastbat": fastbat}[of]
    assert vars(awp.solver(EPS, of)) == vars(file.solver(**({"epsilon": EPS} if of == "fastbat" else {})))
    problem = awp.problem(EPS, of=of)
    step = awp.solver(EPS, of).backward(problem, network(), next(batches(1)), seeded(1))
    assert step.loss.isfinite() and problem.threat == ba.LinfBall(EPS)


def test_label_smoothing_is_passed_on():
    assert awp.problem(EPS, label_smoothing=0.3).upper.upper.criterion.label_smoothing == 0.3
    assert awp.problem(EPS).upper.upper.criterion.label_smoothing == 0.0


def test_what_cannot_be_perturbed_is_refused():
    upper, batch = ba.UpperProblem(), next(batches(1))
    for gamma, line in ((-0.1, "gamma is -0.1; it must be a finite number, at least 0"), ("much", "gamma is 'much'")):
        with pytest.raises(ba.InputError, match=line):
            AWP(upper, gamma)
    for inner in (AWP(upper, 0.1), "minmax"):
        with pytest.raises(ba.InputError, match="must be an UpperProblem other than AWP"):
            AWP(inner, 0.1)
    with pytest.raises(ba.InputError, match="--of is awp, which moves weights itself"):
        awp.problem(EPS, of="awp")
    with pytest.raises(ba.InputError, match="gamma_from is -1; it must be a whole number, at least 0"):
        awp.problem(EPS, gamma_from=-1)
    with pytest.raises(ba.InputError, match="shares the attack's pass"):
        lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(EPS), "zero", "sign", EPS, keep_output=True)
        ZeroIG().hypergradient(ba.BilevelProblem(AWP(upper, 0.1), lower), network(), batch)

    class OnlyScales(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16, dtype=torch.float64))

        def forward(self, x):
            return (x.flatten(1) * self.scale).reshape(len(x), 4, 4).sum(2)

    with pytest.raises(ba.InputError, match="AWP moves weights of more than one dimension; the model has none"):
        ZeroIG().hypergradient(awp.problem(EPS, of="fastat"), OnlyScales(), batch)


def test_the_inner_solver_has_the_epsilon_of_the_run_by_keyword_too(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "from bilevel_at.problems.fastat import problem\n"
        "from bilevel_at.solvers import ZeroIG\n\n\n"
        "def solver(*, epsilon: float = 1.0):\n    made = ZeroIG()\n    made.radius = epsilon\n    return made\n"
    )
    assert awp.solver(EPS, str(own)).radius == EPS
