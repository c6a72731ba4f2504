"""Sub-AT: snapshots, their principal components, and training again within them."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_loops import EPS, batches, cross_entropy, grad, in_ball, in_range, network, noise, one_hot
from transcriptions import seeded

import bilevel_at as ba
from bilevel_at.policy import set_epoch
from bilevel_at.problems import subat
from bilevel_at.problems.subat import Subspace, principal_components
from bilevel_at.solvers import HessianFreeKKT, ZeroIG

EPOCHS, BATCHES, COMPONENTS, RATE = 5, 4, 3, 0.1


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_same_bits(model, twin):
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)


def library_run(solver, problem, model, epochs=range(EPOCHS), optimizer=None, after=lambda epoch: None):
    """A run of five epochs, four of them sampling or as many as the solver says."""
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    for epoch in epochs:
        set_epoch((problem, solver), epoch, EPOCHS)
        generator = seeded(epoch)
        for batch in batches(BATCHES):
            optimizer.zero_grad()
            solver.backward(problem, model, batch, generator)
            optimizer.step()
        after(epoch)
    return optimizer


def fast_at_gradient(twin, batch, radius, generator):
    x, targets = batch.x, one_hot(batch.y)
    z = in_range(noise(x, radius, generator), x).requires_grad_()
    slope = grad(cross_entropy(twin(x + z), targets).sum(), z)
    moved = z.detach() + 1.25 * radius * slope.sign()
    delta = in_ball(moved, x) if radius == EPS else in_range(moved.clamp(-radius, radius), x)
    loss = cross_entropy(twin(x + delta), targets).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))])


def test_the_published_step():
    """Sampling, a basis by the covariance's eigenvectors, θ₀ again, and rate 1 with momentum within the subspace."""
    model, twin = network(), network()
    solver = subat.solver(COMPONENTS, sampling=0.6, every=2, gain=1 / RATE)
    library_run(solver, subat.problem(EPS, sampling=0.6), model)

    start, momentum, snapshots = copy.deepcopy(twin.state_dict()), torch.zeros_like(weights(twin)), []

    def step(gradient, rate):
        nonlocal momentum
        momentum = 0.9 * momentum + gradient
        moved = weights(twin) - rate * momentum
        torch.nn.utils.vector_to_parameters(moved, twin.parameters())

    for epoch in range(3):
        generator = seeded(epoch)
        for number, batch in enumerate(batches(BATCHES)):
            if number % 2 == 0:
                snapshots.append(weights(twin))
            step(fast_at_gradient(twin, batch, EPS, generator), RATE)
    snapshots.append(weights(twin))
    rows = torch.stack(snapshots)
    rows = rows - rows.mean(0)
    top = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -COMPONENTS:]
    twin.load_state_dict(start)
    momentum = RATE * momentum  # of gradients, where the rate is now 1
    for epoch in (3, 4):
        generator = seeded(epoch)
        for batch in batches(BATCHES):
            gradient = fast_at_gradient(twin, batch, 2 * EPS, generator)
            step(top @ (top.T @ gradient), 1.0)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_without_momentum_weights_stay_in_the_subspace_and_training_begins_at_the_first():
    model = network()
    first, seen = weights(model), []
    solver, problem = subat.solver(COMPONENTS, sampling=0.6, every=2), subat.problem(EPS, sampling=0.6)
    plain = torch.optim.SGD(model.parameters(), lr=RATE)
    library_run(solver, problem, model, optimizer=plain, after=lambda epoch: seen.append(weights(model)))
    basis = solver.basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(COMPONENTS, dtype=torch.float64))
    for epoch, moved in enumerate(seen):
        moved = moved - first
        outside = (moved - basis.T @ (basis @ moved)).norm()
        assert outside < 1e-12 if epoch >= 3 else outside > 1e-3
    assert solver.snapshots == []


def test_sampling_is_fast_at():
    """Bit for bit, and running statistics too; a run of one epoch only samples."""
    from bilevel_at.problems import fastat

    ours, theirs = network(), network()
    library_run(subat.solver(sampling=0.6), subat.problem(EPS, sampling=0.6), ours, range(3))
    library_run(ZeroIG(), fastat.problem(EPS), theirs, range(3))
    assert_same_bits(ours, theirs)
    solver = subat.solver()
    solver.set_epoch(0, 1)
    assert solver.samples


def test_the_basis_is_of_the_centred_snapshots():
    torch.manual_seed(0)
    rows = torch.randn(6, 40, dtype=torch.float64) * torch.linspace(1, 3, 40) + 5
    basis = principal_components(rows, 3)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    torch.testing.assert_close(basis.T @ basis, vectors[:, -3:] @ vectors[:, -3:].T, rtol=1e-9, atol=1e-10)
    assert principal_components(rows, 80).shape == (5, 40)  # six centred rows have rank five
    assert principal_components(rows[:1].expand(4, -1), 3).shape == (0, 40)


@pytest.mark.parametrize("after", [2, 3, 4])
def test_a_run_that_is_resumed_is_the_unbroken_one(after):
    """In the midst of sampling, as training begins, and in training."""
    whole = network()
    library_run(subat.solver(COMPONENTS, 0.6, 2), subat.problem(EPS, sampling=0.6), whole)
    broken, solver = network(), subat.solver(COMPONENTS, 0.6, 2)
    optimizer = library_run(solver, subat.problem(EPS, sampling=0.6), broken, range(after))
    state = copy.deepcopy(solver.state_dict())
    resumed = subat.solver(COMPONENTS, 0.6, 2)
    resumed.load_state_dict(state)
    library_run(resumed, subat.problem(EPS, sampling=0.6), broken, range(after, EPOCHS), optimizer)
    assert_same_bits(whole, broken)


class Broken(ba.UpperProblem):
    def loss_at(self, model, batch, solution, generator=None):
        raise ZeroDivisionError


def test_a_backward_that_fails_leaves_the_network_and_the_snapshots_as_they_were():
    model, solver, problem = network(), subat.solver(COMPONENTS, 0.6, 2), subat.problem(EPS, sampling=0.6)
    library_run(solver, problem, model, range(3))
    before, taken = copy.deepcopy(model.state_dict()), len(solver.snapshots)
    broken = ba.BilevelProblem(Broken(), ba.AtAnchor(ba.LinfBall(EPS)))
    set_epoch((problem, solver), 3, EPOCHS)
    with pytest.raises(ZeroDivisionError):
        solver.backward(broken, model, next(batches(1)), seeded(1))
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    assert solver.basis is None and len(solver.snapshots) == taken == 6


def test_the_implicit_term_is_projected_too():
    """Around another solver."""
    model, batch = network().eval(), next(batches(1))
    model[4].weight.data *= 20
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.4, None), "zero", "taylor", 0.3)
    problem, inner = ba.BilevelProblem(ba.UpperProblem(), lower), HessianFreeKKT()
    solver = Subspace(inner, gain=2.0)
    plain = inner.hypergradient(problem, model, batch)
    basis = torch.linalg.qr(torch.randn(len(weights(model)), 4, generator=seeded(1), dtype=torch.float64)).Q.T
    assert torch.equal(solver.hypergradient(problem, model, batch).implicit_norm, plain.implicit_norm)
    solver.basis = basis
    step = solver.hypergradient(problem, model, batch)
    named = list(model.named_parameters())
    for ours, theirs in ((step.direct, plain.direct), (step.implicit, plain.implicit)):
        flat = [
            torch.cat([torch.zeros_like(p).flatten() if of.get(n) is None else of[n].flatten() for n, p in named])
            for of in (ours, theirs)
        ]
        assert flat[0].norm() > 1e-6
        torch.testing.assert_close(flat[0], 2 * basis.T @ (basis @ flat[1]))


def test_the_radius_of_training_is_wider_than_that_of_sampling():
    growing = ba.Schedule(lambda step, steps: 0.1 * (step + 1) / steps, by="step")
    problem = subat.problem(growing, sampling=0.5)
    for epoch, step, radius in ((0, 4, 0.05), (2, 9, 0.2)):
        problem.set_epoch(epoch, 4)
        problem.set_step(step, 10)
        assert problem.lower.constraint.radius == pytest.approx(radius)
    assert problem.threat.radius == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"components": 0}, "components is 0; it must be a whole number, at least 1"),
        ({"every": 0}, "every is 0; it must be a whole number, at least 1"),
        ({"sampling": 0.0}, "sampling is 0; it must be a positive finite number"),
        ({"sampling": 1.2}, "sampling is 1.2; it must be a share of the epochs, above 0 and at most 1"),
        ({"gain": -1.0}, "gain is -1; it must be a positive finite number"),
    ],
)
def test_arguments_out_of_range(arguments, line):
    with pytest.raises(ba.InputError, match=line):
        subat.solver(**arguments)
    with pytest.raises(ba.InputError, match="widen is 0; it must be a positive finite number"):
        subat.problem(EPS, widen=0.0)


def test_training_without_snapshots_and_a_subspace_of_another_network_are_refused():
    model, problem, solver = network(), subat.problem(EPS), subat.solver()
    solver.set_epoch(4, EPOCHS)
    with pytest.raises(ba.InputError, match="trains in the subspace of its snapshots; there are none"):
        solver.backward(problem, model, next(batches(1)))
    solver.basis = torch.eye(2, 7, dtype=torch.float64)
    with pytest.raises(ba.InputError, match="the subspace is of 7 weights; this network has"):
        solver.backward(problem, model, next(batches(1)))
