"""Methods that other groups published, written with the public API alone: the seams of the language hold.

Each is compared with a plain loop over the authors' formulas, in float64, weights and running statistics after several
updates. None of them needs anything of the core that another one does not.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from plain_loops import EPS, assert_same, batches, grad, in_ball, network, train, update
from torch.func import functional_call
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.problems.fgsm_pgi import Tied
from bilevel_at.problems.ssat import Shortened
from bilevel_at.solvers import HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck

# NuAT (Sriramanan et al., 2021): an attack that alternates by batch, against a reference in another mode.


class Nuclear(ba.CrossEntropy):
    """Minus the attack's loss: the nuclear norm is in it in every second batch, with a weight that grows."""

    def __init__(self, counter, weight):
        super().__init__()
        self.counter, self.weight = counter, weight

    def prepare(self, model, batch, generator):
        with ba.attack_mode(model, "train"), torch.no_grad():
            return batch.replace(reference=model(batch.x))

    def value(self, output, batch):
        total = super().value(output, batch).sum()
        if self.counter.count % 2:
            total = total + self.weight.value * torch.linalg.matrix_norm(batch.more["reference"] - output, "nuc")
        return -total


class NuclearUpper(ba.UpperProblem):
    """The cross-entropy at x, and the nuclear norm of the batch's change: one number."""

    def __init__(self, weight, size):
        self.weight, self.size = weight, size

    def loss_at(self, model, batch, solution, generator=None):
        moved, clean = model(batch.x + solution.delta), model(batch.x)
        change = torch.linalg.matrix_norm(clean - moved, "nuc")
        return F.cross_entropy(clean, batch.y) + self.weight.value * change / self.size


def test_nuat_alternates_and_takes_its_reference_in_train_mode():
    model, twin = network(), network()
    counter, weight = ba.Counter(), ba.Schedule(lambda epoch, epochs: 4.5 * epoch / 90)
    attack = Nuclear(counter, weight)
    lower = ba.Linearized(attack, ba.LinfBall(EPS), ba.Corner(EPS / 2), "sign", EPS, "eval")
    problem = ba.BilevelProblem(NuclearUpper(weight, 5), lower)
    problem.set_epoch(40, 100)
    assert sum(p is weight for p in ba.policies(problem).values()) == 1  # shared, and told once
    train(problem, ZeroIG(), model, 3, torch.Generator().manual_seed(7))

    generator, lam = torch.Generator().manual_seed(7), 4.5 * 40 / 90
    for number, batch in enumerate(batches(3)):
        x, y = batch.x, batch.y
        reference = twin(x).detach()
        corner = EPS / 2 * torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1.0, 1.0).double()
        z = (torch.clamp(x + corner, 0, 1) - x).requires_grad_()
        twin.eval()
        output = twin(x + z)
        total = F.cross_entropy(output, y, reduction="sum")
        if number % 2:
            total = total + lam * torch.linalg.matrix_norm(reference - output, "nuc")
        delta = in_ball(z.detach() + EPS * grad(total, z).sign(), x)
        twin.train()
        moved = twin(x + delta)
        clean = twin(x)
        loss = F.cross_entropy(clean, y) + lam * torch.linalg.matrix_norm(clean - moved, "nuc") / 5
        update(twin, torch.autograd.grad(loss, list(twin.parameters())))
    assert_same(model, twin)


# YOPO (Zhang et al., 2019): a solver of its own, which sums gradients at several points.


class YOPO(ba.Solver):
    """K full passes, each followed by n steps that go through the first layer alone."""

    implicit = False

    def __init__(self, first, passes, steps, size):
        self.first, self.passes, self.steps, self.size = first, passes, steps, size

    def hypergradient(self, problem, model, batch, anchor=None, generator=None, *, scale=1.0):
        first, rest = getattr(model, self.first), model[1:]
        solution = problem.lower.solve(model, batch, anchor, generator)
        eta, names = solution.delta, dict(model.named_parameters())
        total = {name: torch.zeros_like(p) for name, p in names.items()}
        for _ in range(self.passes):
            hidden = first(batch.x + eta)
            losses = F.cross_entropy(rest(hidden), batch.y, reduction="none")
            *gradients, p = torch.autograd.grad(losses.mean() * scale, [*names.values(), hidden])
            for _ in range(self.steps):
                eta = eta.detach().requires_grad_()
                slope = grad((p * first(torch.clamp(batch.x + eta, 0, 1))).sum(), eta)
                eta = problem.lower.constraint.project(eta.detach() + self.size * slope.sign(), batch.x)
            last = (p * first(torch.clamp(batch.x + eta, 0, 1))).sum()
            for name, gradient in zip(names, gradients, strict=True):
                total[name] += gradient
            for (name, _), gradient in zip(
                first.named_parameters(), torch.autograd.grad(last, list(first.parameters())), strict=True
            ):
                total[f"{self.first}.{name}"] += gradient
        v = torch.zeros_like(eta)
        return ba.Hypergradient(losses.detach(), total, {}, replace(solution, delta=eta), v, scale)


def test_yopo_is_a_solver_of_its_own():
    model, twin = network(), network()
    lower = ba.AtAnchor(ba.LinfBall(EPS), "uniform")
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    train(problem, YOPO("0", passes=3, steps=2, size=0.02), model, 2, torch.Generator().manual_seed(7))

    generator = torch.Generator().manual_seed(7)
    for batch in batches(2):
        x, y = batch.x, batch.y
        eta = ba.LinfBall(EPS).sample(x, generator)
        twin.zero_grad()
        for _ in range(3):
            hidden = twin[0](x + eta)
            hidden.retain_grad()
            F.cross_entropy(twin[1:](hidden), y).backward()
            p = hidden.grad.detach()
            for _ in range(2):
                eta = eta.detach().requires_grad_()
                slope = grad((p * twin[0](torch.clamp(x + eta, 0, 1))).sum(), eta)
                eta = in_ball(eta.detach() + 0.02 * slope.sign(), x)
            (p * twin[0](torch.clamp(x + eta, 0, 1))).sum().backward()
        update(twin, [q.grad for q in twin.parameters()])
    assert_same(model, twin)


# AWP (Wu et al., 2020): an upper problem whose weights are moved against the loss first.


class Perturbed(ba.UpperProblem):
    """f(θ + V, δ), V_l = γ ‖W_l‖ G_l/‖G_l‖ with G = ∇_θ f on copies of the buffers; V is a constant."""

    def __init__(self, gamma, moved=None):
        self.criterion, self.gamma, self.moved = ba.cross_entropy, gamma, moved

    def direction(self, model, batch, delta):
        weights = {n: p.detach().requires_grad_() for n, p in model.named_parameters() if p.ndim > 1}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        loss = self.criterion(lambda x: functional_call(model, {**weights, **buffers}, (x,)), batch, delta).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        return {n: self.gamma * w.norm() * g / g.norm() for (n, w), g in zip(weights.items(), gradients, strict=True)}

    def loss_at(self, model, batch, solution, generator=None):
        moved = self.moved or self.direction(model, batch, solution.delta.detach())
        weights = {n: p + moved[n].detach() if n in moved else p for n, p in model.named_parameters()}
        return self.criterion(lambda x: functional_call(model, weights, (x,)), batch, solution.delta)


def fast_at():
    return ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(EPS), ba.Uniform(EPS), "sign", 1.25 * EPS, "train")


def test_awp_is_an_upper_problem():
    model, twin, gamma = network(), network(), 0.05
    train(ba.BilevelProblem(Perturbed(gamma), fast_at()), ZeroIG(), model, 3, torch.Generator().manual_seed(7))

    generator = torch.Generator().manual_seed(7)
    for batch in batches(3):
        x, y = batch.x, batch.y
        draw = (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1) * EPS
        z = (torch.clamp(x + draw, 0, 1) - x).requires_grad_()
        delta = in_ball(z.detach() + 1.25 * EPS * grad(F.cross_entropy(twin(x + z), y), z).sign(), x)
        proxy = copy.deepcopy(twin)
        gradients = torch.autograd.grad(F.cross_entropy(proxy(x + delta), y), list(proxy.parameters()))
        moves = [
            gamma * p.norm() * g / g.norm() if p.ndim > 1 else torch.zeros_like(p)
            for p, g in zip(proxy.parameters(), gradients, strict=True)
        ]
        update(twin, moves, rate=-1)
        loss = F.cross_entropy(twin(x + delta), y)
        final = torch.autograd.grad(loss, list(twin.parameters()))
        update(twin, moves, rate=1)
        update(twin, final)
    assert_same(model, twin)


def test_awp_without_a_perturbation_is_the_plain_step_bit_for_bit():
    moved, plain = network(), network()
    train(ba.BilevelProblem(Perturbed(0.0), fast_at()), ZeroIG(), moved, 2, torch.Generator().manual_seed(7))
    train(ba.BilevelProblem(ba.UpperProblem(), fast_at()), ZeroIG(), plain, 2, torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(moved.parameters(), plain.parameters(), strict=True))


def test_awp_has_the_jacobian_of_the_attack_at_theta():
    """v is at θ + V and the cross derivative at θ, with V constant."""
    model, batch = network().eval(), next(batches(1))
    model[4].weight.data *= 20
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.4, None), "zero", "taylor", 0.3)
    moved = Perturbed(0.05).direction(model, batch, torch.zeros_like(batch.x))
    problem = ba.BilevelProblem(Perturbed(0.05, moved), lower)
    assert HessianFreeKKT().hypergradient(problem, model, batch).implicit_norm > 1e-3
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch, rtol=1e-6)


# Starts that are not clipped, outputs that are shared, and solutions that have no derivative.


@pytest.mark.parametrize("start", [ba.Uniform(3 * EPS, clip=False), ba.Corner(3 * EPS, clip=False)])
def test_starts_that_are_not_clipped_leave_the_range(start):
    model, batch = network(), next(batches(1))
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(EPS), start, "sign", EPS, "eval")
    solution = lower.solve(model, batch, generator=torch.Generator().manual_seed(7))
    z = solution.anchor
    assert z.abs().max() > 2 * EPS
    assert ((batch.x + z < 0) | (batch.x + z > 1)).any()
    model.eval()
    at = z.clone().requires_grad_()
    slope = grad(F.cross_entropy(model(batch.x + at), batch.y, reduction="sum"), at)
    torch.testing.assert_close(solution.delta, in_ball(z + EPS * slope.sign(), batch.x))


SMOOTHED = ba.CrossEntropy(0.4, over="others")


def test_a_kkt_solver_refuses_a_solution_without_a_derivative():
    model, batch = network(), next(batches(1))
    lower = Shortened(ba.minus(ba.cross_entropy), ba.LinfBall(EPS), "uniform", "taylor", EPS)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    assert ZeroIG().hypergradient(problem, model, batch).loss > 0
    with pytest.raises(ba.InputError, match="Shortened finds a δ\\* without a derivative"):
        HessianFreeKKT().hypergradient(problem, model, batch)


def test_reading_an_output_that_was_not_kept_is_an_error():
    lower = ba.Linearized(ba.minus(SMOOTHED), ba.LinfBall(EPS), "uniform", "sign", EPS)
    with pytest.raises(ba.InputError, match="keep_output=True"):
        ZeroIG().hypergradient(ba.BilevelProblem(Tied(SMOOTHED, 10), lower), network(), next(batches(1)))


def test_a_kept_output_and_an_implicit_term_go_together():
    model, batch = network().eval(), next(batches(1))
    model[4].weight.data *= 20
    ball = ba.LinfBall(0.4, None)
    lower = ba.Linearized(ba.minus(SMOOTHED), ball, "zero", "taylor", 0.3, keep_output=True)
    problem = ba.BilevelProblem(Tied(SMOOTHED, 10), lower)
    assert HessianFreeKKT().hypergradient(problem, model, batch).implicit_norm > 1e-3
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch, rtol=1e-6)
