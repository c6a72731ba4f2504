"""FGSM-SDI: a start that a second network proposes, and when that one learns."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_loops import CLASSES, EPS, assert_same, batches, cross_entropy, grad, network, one_hot, train, update
from torch import nn
from transcriptions import seeded

import bilevel_at as ba
from bilevel_at.problems import awp, fastat, fgsm_sdi, qub
from bilevel_at.problems.fgsm_sdi import Generated, generator_network
from bilevel_at.solvers import ZeroIG


def adam(parameters, gradients, state, rate=1e-3):
    """Kingma and Ba's step, with their constants."""
    state["t"] = t = state.get("t", 0) + 1
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        m = 0.9 * state.get(("m", i), 0) + 0.1 * g
        v = 0.999 * state.get(("v", i), 0) + 0.001 * g * g
        state["m", i], state["v", i] = m, v
        p.data -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)


@pytest.mark.parametrize(("epsilon", "step"), [(EPS, None), (EPS, 1.5 * EPS)])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_the_published_step(every, epsilon, step):
    """Both networks, their running statistics, and Adam's state, over four batches."""
    model, twin = network(), network()
    problem = fgsm_sdi.problem(epsilon, step)
    train(problem, fgsm_sdi.solver(every), model, 4, seeded(7))

    g, state, step = generator_network(1).double(), {}, epsilon if step is None else step
    for number, batch in enumerate(batches(4)):
        x, targets = batch.x, one_hot(batch.y, 0.5, 0.5 / (CLASSES - 1))

        def attacked(z, x=x, targets=targets):
            """clip(z + clip(step · sign)), with the sign a constant."""
            at = z.detach().requires_grad_()
            sign = grad(cross_entropy(twin(x + at), targets).sum(), at).sign()
            return (z + (step * sign)).clamp(-epsilon, epsilon)

        at = x.clone().requires_grad_()
        clean = grad(cross_entropy(twin(at), targets).sum(), at).sign()
        both = torch.cat([x, clean], 1)
        if number % every == 0:
            g.train()
            loss = cross_entropy(twin(x + attacked(epsilon * g(both).tanh())), targets).mean()
            parameters = list(g.parameters())
            adam(parameters, [-h for h in torch.autograd.grad(loss, parameters)], state)
        g.eval()
        delta = attacked((epsilon * g(both).tanh()).detach())
        loss = cross_entropy(twin(x + delta), targets).mean()
        update(twin, torch.autograd.grad(loss, list(twin.parameters())))
    assert_same(model, twin)
    assert_same(problem.lower.anchor.network, g)


def test_the_generator_learns_up_the_loss():
    """Over a few lessons on one batch the loss at its start grows."""
    model, batch = network().eval(), next(batches(1))
    problem = fgsm_sdi.problem(EPS, generator_lr=0.01)
    problem.lower.mode = "eval"
    lower, anchor = problem.lower, problem.lower.anchor
    sign = fgsm_sdi.clean_sign(lower, model, batch)

    def loss():
        with torch.no_grad():
            network = copy.deepcopy(anchor._network(batch.x)).train()
            delta = anchor.start(network, batch.x, sign)
            return ba.cross_entropy(model, batch, delta).mean().item()

    before = loss()
    for _ in range(20):
        anchor.learn(lower, problem.upper, model, batch, sign)
    assert loss() > before


def test_its_size_is_the_published_one():
    """79,174 with one number that the authors' code never uses."""
    assert sum(p.numel() for p in generator_network(3).parameters()) == 79_173
    assert generator_network(3)(torch.rand(2, 6, 8, 8)).shape == (2, 3, 8, 8)
    before = torch.get_rng_state()
    first, again, other = (generator_network(3, seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_the_perturbation_is_not_kept_in_the_input_range_and_the_threat_is():
    problem = fgsm_sdi.problem(EPS)
    model, batch = network(), next(batches(1))
    delta = problem.lower.solve(model, batch).delta
    assert ((batch.x + delta < 0) | (batch.x + delta > 1)).any() and delta.abs().max() <= EPS
    assert problem.threat == ba.LinfBall(EPS)


def test_a_state_goes_on_where_it_was_left():
    """Generator, its running statistics and Adam's moments."""
    whole, parts = network(), network()
    one, other, solver = fgsm_sdi.problem(EPS), fgsm_sdi.problem(EPS), fgsm_sdi.solver(2)
    train(one, solver, whole, 3)
    train(other, fgsm_sdi.solver(2), parts, 3)
    resumed, again = fgsm_sdi.problem(EPS), fgsm_sdi.solver(2)
    resumed.load_state_dict(copy.deepcopy(other.state_dict()))
    again.counter.load_state_dict(solver.counter.state_dict())
    for problem, of, model in ((one, solver, whole), (resumed, again, parts)):
        train(problem, of, model, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))


def test_a_backward_that_fails_leaves_the_generator_as_it_was():
    problem, solver = fgsm_sdi.problem(EPS), fgsm_sdi.solver(1)
    train(problem, solver, network(), 2)
    before = copy.deepcopy(problem.state_dict())

    class Broken(ba.UpperProblem):
        passes = 0

        def loss_at(self, model, batch, solution, generator=None):
            self.passes += 1
            if self.passes == 2:  # the generator has learnt by then
                raise ZeroDivisionError
            return super().loss_at(model, batch, solution, generator)

    problem.upper = Broken()
    with pytest.raises(ZeroDivisionError):
        train(problem, solver, network(), 1)
    after = problem.state_dict()["lower.anchor"]["network"]
    assert all(torch.equal(a, after[name]) for name, a in before["lower.anchor"]["network"].items())


def test_what_does_not_fit_is_refused_in_one_line():
    problem = fgsm_sdi.problem(EPS)
    train(problem, fgsm_sdi.solver(), network(), 1)
    colour = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, CLASSES)).double()
    batch = ba.Batch(torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1]))
    with pytest.raises(ba.InputError, match="the generator is for images of 1 channels; these have 3"):
        ZeroIG().hypergradient(problem, colour, batch)
    flat = nn.Linear(6, CLASSES)
    with pytest.raises(ba.InputError, match=r"x has shape \(2, 6\); the generator's inputs are images \[B, C, H, W\]"):
        ZeroIG().hypergradient(fgsm_sdi.problem(EPS), flat, ba.Batch(torch.rand(2, 6), torch.tensor([0, 1])))
    state = copy.deepcopy(problem.state_dict())
    del state["lower.anchor"]["network"]["5.bias"]
    with pytest.raises(ba.InputError, match="the generator's state is not of fgsm_sdi.py's network"):
        fgsm_sdi.problem(EPS).load_state_dict(state)
    with pytest.raises(ba.InputError, match="SDI trains the generator of fgsm_sdi.py; .* has none"):
        fgsm_sdi.solver().backward(fastat.problem(EPS), network(), next(batches(1)))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"generator_lr": 0.0}, "lr is 0; it must be a positive finite number"),
        ({"generator_seed": -1}, "seed is -1; it must be a whole number, at least 0"),
        ({"epsilon": -0.1}, "is -0.1; it must be a finite number, at least 0"),
    ],
)
def test_arguments_out_of_range(arguments, line):
    with pytest.raises(ba.InputError, match=line):
        fgsm_sdi.problem(**{"epsilon": EPS, **arguments})
    with pytest.raises(ba.InputError, match="every is 0; it must be a whole number, at least 1"):
        fgsm_sdi.solver(0)
    assert isinstance(Generated(ba.Schedule(lambda e, n: 0.1)), ba.Anchor)


@pytest.mark.parametrize("file", [awp, qub])
def test_the_generator_learns_under_another_upper_problem(file):
    """The other file's solver and its problem are of one module, and what the upper problem prepares is there."""
    problem, model = file.problem(EPS, of="fgsm_sdi"), network()
    file.solver(EPS, of="fgsm_sdi").backward(problem, model, next(batches(1)), seeded(1))
    assert problem.lower.anchor.adam and all(p.grad is not None for p in model.parameters())


def test_the_start_is_float32_under_autocast():
    problem, model = fgsm_sdi.problem(EPS), network().float()
    batch = next(batches(1))
    batch = batch.replace(x=batch.x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = fgsm_sdi.solver().hypergradient(problem, model, batch, generator=seeded(1))
    assert step.solution.anchor.dtype == step.solution.attack_gradient.dtype == torch.float32


def test_a_batch_of_another_type_leaves_the_generator_as_it_was():
    problem, model, batch = fgsm_sdi.problem(EPS), network(), next(batches(1))
    fgsm_sdi.solver().backward(problem, model, batch, seeded(1))
    single = batch.replace(x=batch.x.float())
    fgsm_sdi.solver().hypergradient(problem, copy.deepcopy(model).float(), single, generator=seeded(1))
    assert {p.dtype for p in problem.lower.anchor.network.parameters()} == {torch.float64}
