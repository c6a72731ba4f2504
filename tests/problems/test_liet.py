"""LIET: perturbations of grey images as starts, random targets, and a divergence between the two passes."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_loops import (
    CLASSES,
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
)

import bilevel_at as ba
from bilevel_at.problems import liet
from bilevel_at.solvers import ZeroIG


def random_targets(y, share, generator):
    """``share`` on the label, the rest on the others in proportion to uniform draws."""
    rows = torch.rand((len(y), CLASSES), generator=generator, dtype=torch.float64)
    for row, label in zip(rows, y.tolist(), strict=True):
        row[label] = 0
        row *= (1 - share) / row.sum()
        row[label] = share
    return rows


def jensen_shannon(first, second):
    p, q = first.softmax(1), second.softmax(1)
    m = (p + q) / 2
    return (p * (p / m).log() + q * (q / m).log()).sum(1) / 2


def transcription(
    twin, seen, weight, share=0.4, low=0.1, high=0.5, every=20, radius=1.0, project=True, seed=7, universal=None
):
    """The perturbations of grey images that are left, and the shares of pixels that were replaced by noise."""
    generator, rows = torch.Generator().manual_seed(seed), torch.arange(CLASSES)
    for number, batch in enumerate(seen):
        x, y = batch.x, batch.y
        training = random_targets(y, share, generator)
        attack = random_targets(y, share, generator)
        if number % every == 0:
            twin.eval()
            grey = torch.full((CLASSES, *x.shape[1:]), 0.5, dtype=x.dtype).requires_grad_()
            losses = cross_entropy(twin(grey), random_targets(rows, share, generator))
            universal = EPS * grad(losses.sum(), grey).sign()
            twin.train()
        v = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        rho, coin = torch.rand(2, generator=generator, dtype=x.dtype)
        rho = low + rho * (high - low)
        z = torch.where(v < rho, noise(x, radius * EPS, generator), universal[y])
        z = in_range(z if coin >= 0.5 else -z, x).requires_grad_()
        reference = twin(x + z)
        slope = grad(cross_entropy(reference, attack).sum(), z)
        delta = z.detach() + EPS * slope.sign()
        delta = in_ball(delta, x) if project else in_range(delta, x)
        output = twin(x + delta)
        descend(twin, (cross_entropy(output, training) + weight * jensen_shannon(reference, output)).mean())
    return universal


@pytest.mark.parametrize("epoch", [0, 30])
@pytest.mark.parametrize("every", [1, 2, 20])
def test_the_published_step(epoch, every):
    model, twin = network(), network()
    problem = liet.problem(EPS, every=every)
    problem.set_epoch(epoch, 100)
    follow(problem, model, 4)
    universal = transcription(twin, batches(4), epoch + 1.0, every=every)
    assert_same(model, twin)
    torch.testing.assert_close(problem.lower.anchor.universal, universal)


def test_the_published_step_at_a_large_radius():
    model, twin = network(), network()
    problem = liet.problem(EPS, 20.0, 0.0, 1.0, 2.0, 3, False, 0.4)
    problem.set_epoch(49, 100)
    follow(problem, model, 4)
    transcription(twin, batches(4), 10.0, 0.6, 0.0, 1.0, 3, 2.0, False)
    assert_same(model, twin)
    assert problem.lower.constraint == ba.Range()
    assert problem.threat.epsilon == EPS


def test_targets_are_drawn_anew_for_each_player_and_sum_to_one():
    model, batch, problem = network(), next(batches(1)), liet.problem(EPS, label_smoothing=0.6)
    generator = torch.Generator().manual_seed(7)
    first, second = (player.prepare(model, batch, generator) for player in (problem.upper, problem.lower))
    targets = torch.stack([b.more["targets"] for b in (first, second)])
    torch.testing.assert_close(targets.sum(2), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(targets[:, torch.arange(5), batch.y], torch.full((2, 5), 0.4, dtype=torch.float64))
    assert not torch.equal(targets[0], targets[1])


def test_grey_images_are_seen_in_every_nth_batch_in_eval_mode():
    model, passes = network(), []
    model.register_forward_hook(lambda module, inputs, output: passes.append((len(inputs[0]), module.training)))
    follow(liet.problem(EPS, every=2), model, 3)
    one, grey, batch = (1, False), (CLASSES, False), (5, True)
    # Before the first step has told it, one example tells how many classes there are.
    assert passes[:3] == [one, one, one]
    assert passes[3:] == [grey, batch, batch, batch, batch, grey, batch, batch]


def test_images_of_another_shape_have_grey_images_of_their_own():
    problem, batch = liet.problem(EPS), next(batches(1))
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(CLASSES)).double()
    follow(problem, network(), 1)
    step = ZeroIG().hypergradient(problem, flat, ba.Batch(batch.x[:, :, :3], batch.y))
    assert step.solution.memo.shape == (CLASSES, 1, 3, 4)


def test_training_goes_on_from_a_checkpoint_to_the_same_bits():
    whole, model = liet.problem(EPS), network()
    follow(whole, model, 2)
    resumed, twin = liet.problem(EPS), copy.deepcopy(model)
    resumed.set_epoch(0, 1)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert torch.equal(resumed.lower.anchor.universal, whole.lower.anchor.universal)
    for problem, network_of_its_own in ((whole, model), (resumed, twin)):
        follow(problem, network_of_its_own, 3, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coefficient": -1}, "coefficient is -1; it must be a finite number, at least 0"),
        ({"rho_low": 0.7}, "rho_low is 0.7 and rho_high 0.5; they must be in order, from 0 to 1"),
        ({"rho_high": 1.5}, "rho_low is 0.1 and rho_high 1.5; they must be in order, from 0 to 1"),
        ({"noise": -1}, "noise is -1; it must be a finite number, at least 0"),
        ({"every": 0}, "every is 0; it must be a whole number, at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ba.InputError, match=message):
        liet.problem(EPS, **arguments)


def test_labels_are_checked():
    batch = next(batches(1))
    with pytest.raises(ba.InputError, match="label 9 is out of range: the model has 3 outputs"):
        ZeroIG().hypergradient(liet.problem(EPS), network(), batch.replace(y=batch.y + 7))
