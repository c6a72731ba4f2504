"""YOPO: gradients summed over full passes, with steps through the first layer between them."""

from __future__ import annotations

import pytest
import torch
from plain_loops import (
    CLASSES,
    EPS,
    assert_same,
    batches,
    cross_entropy,
    grad,
    in_ball,
    network,
    noise,
    one_hot,
    train,
    update,
)
from torch import nn
from transcriptions import seeded

import bilevel_at as ba
from bilevel_at.models import MODELS, build_model
from bilevel_at.problems import qub, trades, yopo
from bilevel_at.problems.yopo import YOPO, first_layer


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("m", "n"), [(3, 2), (1, 1)])
def test_the_published_step(m, n, both, smoothing):
    model, twin, step = network(), network(), 0.02
    problem = yopo.problem(EPS, label_smoothing=smoothing)
    train(problem, yopo.solver(m, n, step, both), model, 2, seeded(7))

    generator = seeded(7)
    for batch in batches(2):
        x, targets = batch.x, one_hot(batch.y, 1 - smoothing + smoothing / CLASSES, smoothing / CLASSES)
        eta = noise(x, EPS, generator)
        total = [torch.zeros_like(p) for p in twin.parameters()]
        for _ in range(m):
            hidden = twin[0](x + eta)
            loss = cross_entropy(twin[1:](hidden), targets).mean()
            *a, p = torch.autograd.grad(loss, [*twin.parameters(), hidden])
            for _ in range(n):
                at = eta.clone().requires_grad_()
                slope = grad((p * twin[0](torch.clamp(x + at, 0, 1))).sum(), at)
                eta = in_ball(eta + step * slope.sign(), x)
            b = torch.autograd.grad((p * twin[0](torch.clamp(x + eta, 0, 1))).sum(), list(twin[0].parameters()))
            for i, gradient in enumerate(a):
                first = i < len(b)
                total[i] += (b[i] if first else 0) + (gradient if both or not first else 0)
        update(twin, total)
    assert_same(model, twin)


def test_the_normalisation_belongs_to_the_first_layer():
    """L of a network that normalises its inputs is the first convolution of normalised inputs."""
    torch.manual_seed(0)
    inner = network().eval()
    wrapped = nn.Sequential(nn.BatchNorm2d(1, affine=False).double(), *inner).eval()
    wrapped[0].running_mean.fill_(0.4)
    wrapped[0].running_var.fill_(0.25)
    x = next(batches(1)).x
    torch.testing.assert_close(first_layer(wrapped, x), inner[0]((x - 0.4) / (0.25 + 1e-5) ** 0.5))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_network_of_the_catalogue_is_split_at_its_first_convolution(name):
    """The first layer's output is that of the first convolution; running statistics are left alone by the steps."""
    large = name.startswith(("imagenet", "wide_resnet28", "wide_resnet34")) or name.endswith(("34", "50"))
    shape = (3, 64, 64) if name.startswith("imagenet") else (3, 32, 32)
    model = build_model(name, shape, 3).train()
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    x = torch.rand(2, *shape)
    before = {n: b.clone() for n, b in model.named_buffers()}
    hidden = first_layer(model, x)
    assert torch.equal(hidden, convolution((x - model.mean) / model.std))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert not any(module._forward_hooks for module in model.modules())
    if large:  # a whole step of these takes seconds
        return
    step = YOPO(1, 1).hypergradient(yopo.problem(), model, ba.Batch(x, torch.tensor([0, 2])), generator=seeded(1))
    assert all(g is not None and g.isfinite().all() for g in step.grads.values())


def test_the_record_is_of_the_last_full_pass():
    model, batch = network().eval(), next(batches(1))
    step = YOPO(2, 1, 0.03).hypergradient(yopo.problem(EPS), model, batch, generator=seeded(1))
    delta = step.solution.delta.clone().requires_grad_()
    losses = ba.cross_entropy(model, batch, delta)
    torch.testing.assert_close(step.losses, losses.detach())
    torch.testing.assert_close(step.v, grad(losses.mean(), delta))
    assert not torch.equal(step.solution.delta, step.solution.anchor)


def test_a_factor_multiplies_gradients_and_leaves_the_attack_alone():
    """As a GradScaler's does."""
    model, batch = network(), next(batches(1))
    plain = YOPO(2, 2, 0.03).hypergradient(yopo.problem(EPS), network(), batch, generator=seeded(1))
    scaled = YOPO(2, 2, 0.03).hypergradient(yopo.problem(EPS), model, batch, generator=seeded(1), scale=8.0)
    assert torch.equal(plain.solution.delta, scaled.solution.delta)
    for name, gradient in plain.grads.items():
        torch.testing.assert_close(scaled.grads[name], 8 * gradient)


def test_layers_that_are_frozen_stay_out_of_the_sum():
    model, batch = network(), next(batches(1))
    for p in model[0].parameters():
        p.requires_grad_(False)
    step = YOPO(2, 1).hypergradient(yopo.problem(EPS), model, batch, generator=seeded(1))
    assert set(step.grads) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ba.InputError, match="no parameter of the model requires a gradient"):
        YOPO().hypergradient(yopo.problem(EPS), model, batch)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"m": 0}, "m is 0; it must be a whole number, at least 1"),
        ({"n": 0}, "n is 0; it must be a whole number, at least 1"),
        ({"step": 0.0}, "step is 0; it must be a positive finite number"),
    ],
)
def test_arguments_out_of_range(arguments, line):
    with pytest.raises(ba.InputError, match=line):
        yopo.solver(**arguments)


def test_what_cannot_be_split_is_refused_in_one_line():
    batch = next(batches(1))
    dense = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)).double()
    with pytest.raises(ba.InputError, match="YOPO splits .* at its first convolution; the upper loss passes no conv"):
        YOPO().hypergradient(yopo.problem(EPS), dense, batch)
    with pytest.raises(ba.InputError, match="YOPO splits a network at its first convolution; this one has none"):
        first_layer(dense, batch.x)
    with pytest.raises(ba.InputError, match="the upper loss passes the network 2 times"):
        YOPO().hypergradient(trades.problem(EPS, steps=1), network(), batch)
    with pytest.raises(ba.InputError, match="QuadraticBound makes another before it"):
        YOPO().hypergradient(qub.problem(EPS, of="yopo"), network(), batch)
    with pytest.raises(ba.InputError, match=r"Range\(.*\) has none, so give a step"):
        lower = ba.AtAnchor(ba.Range(), ba.Uniform(EPS))
        YOPO().hypergradient(ba.BilevelProblem(ba.UpperProblem(), lower), network(), batch)


def test_the_step_follows_a_radius_that_grows():
    """Without a step of its own it is a quarter of ε in every update, which --epsilon-warmup lets grow."""
    growing = ba.Schedule(lambda step, steps: EPS * (step + 1) / steps, by="step")
    batch, problem, solver = next(batches(1)), yopo.problem(growing), yopo.solver(m=2, n=1)
    problem.set_step(0, 4)
    ours = solver.hypergradient(problem, network(), batch, generator=seeded(1))
    fixed = YOPO(2, 1, EPS / 16).hypergradient(yopo.problem(EPS / 4), network(), batch, generator=seeded(1))
    for name, gradient in fixed.direct.items():
        assert torch.equal(ours.direct[name], gradient)
