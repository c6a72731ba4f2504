"""SSAT: the first length of the perturbation at which the prediction changes."""

from __future__ import annotations

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
    in_range,
    network,
    noise,
    one_hot,
)
from torch import nn

import bilevel_at as ba
from bilevel_at.problems import ssat
from bilevel_at.solvers import ZeroIG


def first_length(model, x, y, delta, start, checkpoints):
    """t of one example: plain tries, shortest first."""
    if model(start).argmax() != y:
        return 0.0
    for k in range(1, checkpoints):
        if model(x + k * delta / checkpoints).argmax() != y:
            return k / checkpoints
    return 1.0


@pytest.mark.parametrize("ask", ["start", "clean"])
@pytest.mark.parametrize("checkpoints", [1, 3, 6])
@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_the_published_step(ask, checkpoints, smoothing):
    model, twin = network(), network()
    for net in (model, twin):
        net[-1].weight.data *= 20
    problem = ssat.problem(4 * EPS, checkpoints, ask, label_smoothing=smoothing)
    follow(problem, model, 6)

    generator, seen = torch.Generator().manual_seed(7), set()
    for batch in batches(6):
        x, y = batch.x, batch.y
        targets = one_hot(y, 1 - smoothing + smoothing / 3, smoothing / 3)
        twin.eval()
        z = in_range(noise(x, 4 * EPS, generator), x).requires_grad_()
        slope = grad(cross_entropy(twin(x + z), targets).sum(), z)
        moved = torch.clamp(z.detach() + 1.25 * 4 * EPS * slope.sign(), -4 * EPS, 4 * EPS)
        delta = in_range(moved, x)
        start = x + z.detach() if ask == "start" else x
        with torch.no_grad():
            lengths = [
                first_length(twin, x[i : i + 1], y[i], delta[i : i + 1], start[i : i + 1], checkpoints)
                for i in range(len(x))
            ]
        seen.update(lengths)
        twin.train()
        t = torch.tensor(lengths, dtype=x.dtype)[:, None, None, None]
        descend(twin, cross_entropy(twin(x + t * delta), targets).mean())
    assert_same(model, twin)
    assert {0.0, 1.0} <= seen
    assert (len(seen) > 2) == (checkpoints > 1)


def test_a_checkpoint_passes_the_examples_that_are_still_right_alone():
    model, batch, rows = network(), next(batches(1)), []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    lower = ssat.problem(EPS, 4).lower
    batch = batch.replace(y=model.eval()(batch.x).argmax(1))
    rows.clear()
    solution = lower.solve(model, batch, torch.zeros_like(batch.x))  # all are right at the start
    assert rows[:2] == [5, 5]
    assert rows == sorted(rows, reverse=True)
    rows.clear()
    lower.solve(model, batch.replace(y=(batch.y + 1) % CLASSES), torch.zeros_like(batch.x))
    assert rows == [5]  # all are wrong: the attack's pass, and no more
    assert solution.kept_output is None


def test_no_perturbation_where_the_start_is_wrong():
    model, batch = network(), next(batches(1))
    z = torch.zeros_like(batch.x)
    batch = batch.replace(y=(model.eval()(batch.x).argmax(1) + 1) % CLASSES)
    assert ssat.problem(EPS).lower.solve(model, batch, z).delta.abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoints": 0}, "checkpoints is 0; it must be a whole number, at least 1"),
        ({"ask": "never"}, "ask is 'never'; choose from 'start', 'clean'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ba.InputError, match=message):
        ssat.problem(EPS, **arguments)


def test_labels_out_of_range_are_refused_by_name():
    batch = next(batches(1))
    with pytest.raises(ba.InputError, match="label 9 is out of range: the model has 3 outputs"):
        ZeroIG().hypergradient(ssat.problem(EPS), network(), batch.replace(y=batch.y + 7))


def test_in_train_mode_one_example_that_is_left_has_batch_statistics():
    """A feature map of 1×1 has none of a single example; here one of six is right at the start, of a whole pass."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, CLASSES)]
    model = nn.Sequential(*layers).double().train()
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    right = model(x).argmax(1)
    y = torch.cat([right[:1], (right[1:] + 1) % CLASSES])
    zero = torch.zeros_like(x)
    delta = ssat.problem(1e-9, mode="train").lower.solve(model, ba.Batch(x, y), zero).delta
    assert delta[0].abs().max() > 0 and delta[1:].abs().max() == 0


def test_a_gpu_takes_every_checkpoint_of_every_example(monkeypatch):
    """In eval mode the lengths are the same, without a look at who is still right."""
    torch.manual_seed(0)
    model, batch = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).double(),
        ba.Batch(torch.rand(200, 3, 2, 2, dtype=torch.float64), torch.randint(0, 4, (200,))),
    )
    batch = batch.replace(y=model(batch.x).argmax(1))  # all right, so that every length occurs
    deltas = []
    for host in (True, False):
        monkeypatch.setattr(ssat, "on_host", lambda values, host=host: host)
        lower = ssat.problem(epsilon=0.05, checkpoints=4).lower
        deltas.append(lower.solve(model, batch, generator=torch.Generator().manual_seed(0)).delta)
    assert torch.equal(*deltas)
    sizes = (deltas[0].flatten(1).abs().amax(1) * 80).round().unique()
    assert len(sizes) >= 4
