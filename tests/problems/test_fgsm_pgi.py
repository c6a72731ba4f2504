"""FGSM-PGI: what is remembered, and the prediction there that the next one is tied to."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_loops import (
    CLASSES,
    EPS,
    assert_same,
    batches,
    corner,
    cross_entropy,
    descend,
    follow,
    grad,
    in_ball,
    network,
    one_hot,
)

import bilevel_at as ba
from bilevel_at.problems import fgsm_pgi
from bilevel_at.solvers import ZeroIG


def transcription(twin, variant, seen, step=EPS, decay=0.3, coefficient=10, share=0.6):
    """BP, EP and MEP; what is remembered after each batch."""
    generator, starts, momenta = torch.Generator().manual_seed(7), {}, {}
    for batch in seen:
        x, targets = batch.x, one_hot(batch.y, share, (1 - share) / (CLASSES - 1))
        keys = range(len(x)) if variant == "bp" else batch.index.tolist()
        corners = corner(x, step, generator).clamp(-EPS, EPS)
        z = torch.stack([starts.get(key, c) for key, c in zip(keys, corners, strict=True)]).requires_grad_()
        reference = twin(x + z)
        slope = grad(cross_entropy(reference, targets).sum(), z)
        old = torch.stack([momenta.get(key, torch.zeros_like(x[0])) for key in keys])
        momentum = slope / slope.abs().sum() + decay * old
        delta = in_ball(z.detach() + step * slope.sign(), x)
        kept = in_ball(z.detach() + step * momentum.sign(), x) if variant == "mep" else delta
        output = twin(x + delta)
        loss = cross_entropy(output, targets).mean()
        descend(twin, loss + coefficient / (len(x) * CLASSES) * (output - reference).square().sum())
        for key, start, m in zip(keys, kept, momentum, strict=True):
            starts[key], momenta[key] = start, m
    return starts, momenta


@pytest.mark.parametrize("variant", ["mep", "ep", "bp"])
@pytest.mark.parametrize("step", [0.6 * EPS, 1.3 * EPS])
def test_the_published_step_with_its_memory(variant, step):
    model, twin = network(), network()
    problem = fgsm_pgi.problem(EPS, variant, step=step)
    follow(problem, model, 4)
    starts, momenta = transcription(twin, variant, batches(4), step)
    assert_same(model, twin)
    memory = problem.lower.anchor.memory
    for key, start in starts.items():
        torch.testing.assert_close(memory.values[key], start, rtol=1e-11, atol=1e-13)
        if variant == "mep":
            torch.testing.assert_close(problem.lower.anchor.momentum.values[key], momenta[key], rtol=1e-9, atol=0)


@pytest.mark.parametrize(("decay", "coefficient", "smoothing"), [(0.0, 10, 0.4), (0.9, 0, 0.0)])
def test_its_settings(decay, coefficient, smoothing):
    model, twin = network(), network()
    follow(fgsm_pgi.problem(EPS, decay=decay, coefficient=coefficient, label_smoothing=smoothing), model, 4)
    transcription(twin, "mep", batches(4), EPS, decay, coefficient, 1 - smoothing)
    assert_same(model, twin)


def test_without_momentum_it_remembers_the_perturbation():
    mep, ep = network(), network()
    follow(fgsm_pgi.problem(EPS, "mep", decay=0.0), mep, 4)
    follow(fgsm_pgi.problem(EPS, "ep"), ep, 4)
    assert_same(mep, ep)


@pytest.mark.parametrize("variant", ["mep", "ep", "bp"])
def test_memory_begins_anew_in_every_nth_epoch(variant):
    problem = fgsm_pgi.problem(EPS, variant, reset_every=3)
    anchor = problem.lower.anchor
    assert [anchor.resets(epoch, 7) for epoch in range(7)] == [True, False, False, True, False, False, True]
    assert not any(fgsm_pgi.problem(EPS, variant, reset_every=0).lower.anchor.resets(epoch, 7) for epoch in range(7))
    follow(problem, network(), 2)
    problem.set_epoch(2, 7)
    assert anchor.memory.values is not None
    problem.set_epoch(3, 7)
    assert anchor.memory.values is None
    if variant == "mep":
        assert anchor.momentum.values is None


@pytest.mark.parametrize("variant", ["mep", "ep", "bp"])
def test_training_goes_on_from_a_checkpoint_to_the_same_bits(variant):
    whole, model = fgsm_pgi.problem(EPS, variant), network()
    follow(whole, model, 2)
    resumed, twin = fgsm_pgi.problem(EPS, variant), copy.deepcopy(model)
    resumed.set_epoch(1, 7)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for problem, network_of_its_own in ((whole, model), (resumed, twin)):
        follow(problem, network_of_its_own, 3, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_zero_gradient_leaves_a_finite_momentum():
    model = network()
    model[-1].weight.data.zero_()
    problem = fgsm_pgi.problem(EPS)
    ZeroIG().backward(problem, model, next(batches(1)))
    assert problem.lower.anchor.momentum.values.abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "pep"}, "variant is 'pep'; choose from 'mep', 'ep', 'bp'"),
        ({"decay": -1}, "decay is -1; it must be a finite number, at least 0"),
        ({"coefficient": -1}, "coefficient is -1; it must be a finite number, at least 0"),
        ({"reset_every": -1}, "reset_every is -1; it must be a whole number, at least 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ba.InputError, match=message):
        fgsm_pgi.problem(EPS, **arguments)


def test_a_batch_without_index_is_refused_where_memory_is_per_example():
    batch = ba.Batch(*((b := next(batches(1))).x, b.y))
    with pytest.raises(ba.InputError, match="pass Batch\\(x, y, index=...\\)"):
        ZeroIG().hypergradient(fgsm_pgi.problem(EPS), network(), batch)
    assert ZeroIG().hypergradient(fgsm_pgi.problem(EPS, "bp"), network(), batch).loss > 0
