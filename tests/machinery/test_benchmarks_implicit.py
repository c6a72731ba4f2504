"""The page about the implicit term: its own derivatives, and the script at the smallest size."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarking import script

import bilevel_at as ba
from bilevel_at.models.small import one_layer_cnn
from bilevel_at.problems import fastbat
from bilevel_at.solvers import HessianFreeKKT


@pytest.fixture
def measures(small_cifar10):
    script("implicit")
    return sys.modules["implicit_measures"]


def small(measures, anchor):
    """A smooth network in float64, a batch, and a problem in which some coordinates are free."""
    torch.manual_seed(0)
    model = one_layer_cnn((1, 4, 4), 3, torch.nn.Softplus).double()
    batch = ba.Batch(0.3 + 0.4 * torch.rand(6, 1, 4, 4).double(), torch.arange(6) % 3)
    return model, batch, measures.with_start(fastbat.problem(epsilon=0.1, step=0.8, anchor=anchor))


def test_the_derivative_through_the_anchor_is_that_of_central_differences(measures):
    model, batch, problem = small(measures, "gradient-step")
    through = measures.Through().hypergradient(problem, model, batch, generator=measures.generator())
    held = HessianFreeKKT().hypergradient(problem, model, batch, generator=measures.generator())
    assert 0.1 < HessianFreeKKT.active(problem.lower, model, held.solution).fraction_free() < 0.95
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    u = torch.randn(before.shape, generator=measures.generator(1), dtype=torch.float64)

    def objective(t, anchor):
        torch.nn.utils.vector_to_parameters(before + t * u, model.parameters())
        solution = problem.lower.solve(model, batch, anchor, measures.generator())
        return ba.cross_entropy(model, batch, solution.delta).mean().item()

    for step, anchor in ((through, None), (held, held.solution.anchor)):
        difference = (objective(1e-5, anchor) - objective(-1e-5, anchor)) / 2e-5
        assert (measures.flat(step.grads) @ u).item() == pytest.approx(difference, rel=1e-6)
    one, other = measures.flat(through.implicit), measures.flat(held.implicit)
    assert (one - other).norm() > 0.1 * other.norm()


def test_from_a_uniform_start_there_is_nothing_to_go_through(measures):
    model, batch, problem = small(measures, "uniform")
    through, held = (
        solver.hypergradient(problem, model, batch, generator=measures.generator())
        for solver in (measures.Through(), HessianFreeKKT())
    )
    for name, part in held.implicit.items():
        torch.testing.assert_close(through.implicit[name], part)


def test_noise_is_as_long_as_the_term(measures):
    model, batch, problem = small(measures, "gradient-step")
    noise, held = (
        solver.hypergradient(problem, model, batch, generator=measures.generator())
        for solver in (measures.Noise(ig_weight=0.5), HessianFreeKKT(ig_weight=0.5))
    )
    assert noise.implicit_norm.item() == pytest.approx(held.implicit_norm.item(), rel=1e-9)
    assert abs(measures.cosine(measures.flat(noise.implicit), measures.flat(held.implicit))) < 0.5


def test_a_start_that_is_handed_on_changes_no_anchor(measures):
    model, batch, problem = small(measures, "gradient-step")
    plain = fastbat.problem(epsilon=0.1, step=0.8)
    one, other = (p.lower.solve(model, batch, generator=measures.generator()) for p in (problem, plain))
    assert torch.equal(one.anchor, other.anchor) and torch.equal(one.delta, other.delta)


def test_small_steps_decrease_as_predicted(measures):
    from bilevel_at.data import Images

    model, batch, problem = small(measures, "gradient-step")
    images = Images(batch.x.float(), batch.y, 3)
    found = measures.decreases(problem, model.float(), images, images)
    for name in ("h", "d"):
        ratio = found[name]["own"][0] / (measures.LENGTHS[0] * found[name]["slope"])
        assert ratio == pytest.approx(1, rel=1e-3)
    assert found["h"]["slope"] == pytest.approx(found["h"]["norm"] ** 2) and found["h"]["anew"] == found["h"]["other"]
    lengths = (0.1, 1.0, 10.0)
    for decrease, expected in (((0.06, 0.6, 1), 1.0), ((0.04, 0.6, 6), None), ((0.1, 1, 10), 10.0)):
        assert measures.valid_length(1.0, decrease, lengths) == expected


def test_the_least_curvature_is_that_of_a_dense_hessian(measures):
    from bilevel_at.data import Images

    model, batch, problem = small(measures, "uniform")
    images = Images(batch.x.float(), batch.y, 3)
    model = model.float()
    least = measures.least_curvature(problem, model, images)
    delta = problem.lower.solve(model, measures.batch_of(images), generator=measures.generator()).delta
    one = ba.Batch(images.x[:1], images.y[:1])
    hessian = torch.autograd.functional.hessian(lambda d: -ba.cross_entropy(model, one, d).sum(), delta[:1])
    expected = torch.linalg.eigvalsh(hessian.reshape(16, 16).double())[0].item()
    assert len(least) == 6 and least[0] == pytest.approx(expected, rel=1e-3)
