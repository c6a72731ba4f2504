"""Compositions by flags are the methods that they say they are, step for step."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_loops import EPS, assert_same, batches, network

import bilevel_at as ba
from bilevel_at.problems import atas, atta, awp, composed, fastat, fastbat, fgsm, minmax, nfgsm, qub, remembered_fastbat
from bilevel_at.solvers import HessianFreeKKT, Lazy, ZeroIG

STEP = 5.0
SAME = {
    "FGSM": (lambda: fgsm.problem(EPS, mode="eval"), {"anchor": "zero"}),
    "Fast-AT": (lambda: fastat.problem(EPS), {"step": 1.25 * EPS, "mode": "train"}),
    "FGSM from a corner": (lambda: fgsm.problem(EPS, "corner", mode="eval"), {"anchor": "corner"}),
    "N-FGSM": (lambda: nfgsm.problem(EPS, mode="eval"), {"anchor": "noise"}),
    "N-FGSM, k = 1": (lambda: nfgsm.problem(EPS, noise=1, mode="eval"), {"anchor": "noise", "noise": 1.0}),
    "ATTA": (lambda: atta.problem(EPS, step=EPS, reset_every=10), {"anchor": "remembered"}),
    "ATAS": (
        lambda: atas.problem(EPS, max_step=2 * EPS, shortest=EPS / 2, longest=1.75 * EPS),
        {"anchor": "remembered", "adaptive": True},
    ),
    "Remembered Fast-BAT": (
        lambda: remembered_fastbat.problem(EPS, max_step=STEP),
        {"anchor": "remembered", "direction": "taylor", "taylor_step": STEP, "adaptive": True},
    ),
    "Fast-BAT": (
        lambda: fastbat.problem(EPS, STEP, mode="eval"),
        {"anchor": "gradient-step", "direction": "taylor", "taylor_step": STEP},
    ),
    "Fast-BAT's sign-step anchor": (
        lambda: fastbat.problem(EPS, STEP, "sign-step", mode="eval"),
        {"anchor": "sign-step", "direction": "taylor", "taylor_step": STEP},
    ),
    "PGD-3": (lambda: minmax.problem(EPS, steps=3, mode="eval"), {"steps": 3}),
    "QUB": (lambda: qub.problem(EPS), {"upper": "qub", "step": 1.25 * EPS}),
    "PGD-10 with AWP": (lambda: awp.problem(EPS, moved_decay=0), {"steps": 10, "gamma": 0.01, "mode": "train"}),
    "smoothed labels": (
        lambda: fastat.problem(EPS, label_smoothing=0.3, mode="eval"),
        {"step": 1.25 * EPS, "label_smoothing": 0.3},
    ),
}


def trained(problem, solver):
    """A network after 16 updates in eight epochs, so that warm-ups end and memories are used."""
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(7)
    for epoch in range(8):
        problem.set_epoch(epoch, 8)
        for number, batch in enumerate(batches(2)):
            index = torch.arange(len(batch)) + number * len(batch)
            optimizer.zero_grad()
            solver.backward(problem, model, batch.replace(index=index), generator)
            optimizer.step()
    return model


@pytest.mark.parametrize("method", SAME)
def test_the_composition_trains_as_the_method_s_own_file(method):
    theirs, flags = SAME[method]
    theirs, ours = theirs(), composed.problem(EPS, **flags)
    assert ours.threat == theirs.threat
    with_term = method == "Fast-BAT"
    solvers = [HessianFreeKKT(ig_weight=0.1 / STEP) if with_term else ZeroIG() for _ in range(2)]
    before = copy.deepcopy(network().state_dict())
    a, b = trained(theirs, solvers[0]), trained(ours, solvers[1])
    assert_same(a, b)
    assert any((value != before[name]).any() for name, value in a.state_dict().items())


def test_the_implicit_term_has_fast_bat_s_weight():
    assert isinstance(composed.solver(), ZeroIG)
    for epsilon in (8 / 255, 16 / 255):
        ours, theirs = (file.solver("hessian-free-kkt", epsilon=epsilon) for file in (composed, fastbat))
        assert ours == theirs
    assert composed.solver("full-kkt", taylor_step=STEP).ig_weight == pytest.approx(0.1 / STEP)
    assert composed.solver("full-kkt").curvature == "attack"
    Lazy(composed.solver("hessian-free-kkt"), 0.25)


def test_a_weight_moves_the_loss_that_has_one():
    batch, losses = next(batches(1)), {}
    for upper, weight in (("trades", None), ("trades", 1.0), ("gradalign", None), ("gradalign", 0.0)):
        problem = composed.problem(EPS, upper=upper, weight=weight)
        step = ZeroIG().hypergradient(problem, network(), batch, generator=torch.Generator().manual_seed(1))
        losses[upper, weight] = step.loss.item()
    assert losses["trades", None] > losses["trades", 1.0]
    assert losses["gradalign", None] > losses["gradalign", 0.0]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"anchor": "far"}, "anchor is 'far'; choose from 'zero', 'uniform'"),
        ({"upper": "mse"}, "upper is 'mse'; choose from 'cross-entropy', 'qub'"),
        ({"weight": 2.0}, "weight is 2, and upper is cross-entropy, which has none; leave it out"),
        ({"upper": "qub", "weight": 2.0}, "weight is 2, and upper is qub"),
        ({"direction": "taylor", "step": 0.1}, "step is 0.1, and direction taylor takes taylor_step"),
        ({"direction": "taylor", "taylor_step": -1.0}, "taylor_step is -1; it must be"),
        ({"steps": 0}, "steps is 0; it must be"),
        ({"noise": -1.0}, "noise is -1; it must be"),
        ({"direction": "up"}, "direction is 'up'; choose from 'sign', 'taylor'"),
        ({"step": 0.0}, "step is 0; it must be"),
        ({"adaptive": True, "step": 0.1}, "step is 0.1, and adaptive steps have a rule of their own; leave it out"),
    ],
)
def test_bad_flags(flags, line):
    with pytest.raises(ba.InputError, match=line):
        composed.problem(EPS, **flags)
