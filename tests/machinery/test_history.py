"""What training records of itself: gradient norms and steps of examples, filters, alignment, the term's angle."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import bilevel_at as ba
from bilevel_at.data import Images
from bilevel_at.diagnose import gradient_alignment, read_history
from bilevel_at.evaluate import Attack
from bilevel_at.models import build_model
from bilevel_at.problems import atas, beta, fastbat, fgsm, standard
from bilevel_at.runs.directory import RunDir
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG
from bilevel_at.train import Recipe, Trainer

SHAPE = (1, 8, 8)


def images(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Images(torch.rand(n, *SHAPE, generator=g), torch.randint(0, 3, (n,), generator=g), 3)


def trainer(problem, solver=None, epochs=2, lr=0.05, data=None, **recipe):
    torch.manual_seed(0)
    model = build_model("one_layer_cnn", SHAPE, 3)
    data = images() if data is None else data
    settings = Recipe(epochs=epochs, batch_size=16, lr=lr, schedule="constant", **recipe)
    return Trainer(problem, solver or ZeroIG(), model, data, images(24, seed=1), settings, Attack("clean"))


def test_gradient_norms_are_those_of_every_example():
    """With a rate that moves nothing, each epoch's norms are those of the initial network at z = 0."""
    t = trainer(fgsm.problem(epsilon=0.1), lr=1e-30)
    list(t.epochs())
    x = t.loader.images.pixels().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(t.model(x), t.loader.images.y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    found = t.recorder.arrays()
    assert found["gradient_norm"].shape == found["step"].shape == (2, 40)
    for epoch in range(2):
        np.testing.assert_allclose(found["gradient_norm"][epoch], gradient.flatten(1).norm(dim=1), rtol=1e-5)
    np.testing.assert_allclose(found["step"], fgsm.problem(epsilon=0.1).lower.step.value)
    assert np.array_equal(found["label"], t.loader.images.y)


def test_adaptive_steps_are_kept_example_by_example():
    t = trainer(atas.problem(epsilon=0.1, max_step=0.4, c=0.02, shortest=0.01, warmup_epochs=1), epochs=3)
    list(t.epochs())
    found = t.recorder.arrays()
    np.testing.assert_allclose(found["step"][0], 0.1)  # the warm-up
    v = t.problem.lower.step.memory.values
    expected = (0.4 * 0.02 / (0.02 + v.sqrt())).clamp(0.01, 0.175)
    np.testing.assert_allclose(found["step"][2], expected, rtol=1e-6)
    assert found["step"][2].std() > 0


def test_what_the_lower_level_does_not_say_is_nan():
    for problem in (standard.problem(), beta.problem(epsilon=0.1, steps=1)):
        t = trainer(problem, epochs=1)
        list(t.epochs())
        assert np.isnan(t.recorder.arrays()["gradient_norm"]).all()


def test_filters_follow_the_first_convolution():
    t = trainer(fgsm.problem(epsilon=0.1))
    before = t.model.network[0].weight.detach().clone()
    list(t.epochs())
    filters = t.recorder.arrays()["filters"]
    assert filters.shape == (3, 4, 1, 3, 3)
    assert np.array_equal(filters[0], before) and np.array_equal(filters[-1], t.model.network[0].weight.detach())


def test_the_file_is_read_back_and_damage_is_survived(tmp_path):
    t = trainer(fgsm.problem(epsilon=0.1))
    list(t.epochs())
    run = RunDir(tmp_path)
    run.save_arrays("history.npz", t.recorder.arrays())
    history = read_history(tmp_path)
    assert torch.equal(history.gradient_norm, torch.from_numpy(t.recorder.arrays()["gradient_norm"]))
    again = trainer(fgsm.problem(epsilon=0.1))
    again.recorder.restore(run.arrays("history.npz"), 1)
    assert len(again.recorder.epochs) == 1 and len(again.recorder.filters) == 2
    assert torch.equal(again.recorder.epochs[0][0], history.gradient_norm[0])
    (tmp_path / "history.npz").write_bytes(b"PK\x03\x04 nothing")
    again.recorder.restore(run.arrays("history.npz"), 2)
    assert len(again.recorder.epochs) == 2 and again.recorder.epochs[1][0].isnan().all()
    np.savez(tmp_path / "history.npz", gradient_norm=np.array([{}], dtype=object))  # nothing is unpickled
    assert run.arrays("history.npz") == {}


def test_too_many_examples_are_not_followed(monkeypatch):
    monkeypatch.setattr("bilevel_at.train.recorder.MOST_EXAMPLES", 39)
    t = trainer(fgsm.problem(epsilon=0.1), epochs=1)
    list(t.epochs())
    assert t.recorder.arrays() == {}


def test_alignment_is_measured_on_held_out_examples():
    t = trainer(fgsm.problem(epsilon=0.1), epochs=1)
    (epoch,) = t.epochs()
    expected = gradient_alignment(t.model, t.held_out, ba.LinfBall(0.1), seed=1).nanmean().item()
    assert epoch.alignment == pytest.approx(expected) and 0 < epoch.alignment <= 1


@pytest.mark.parametrize("solver", [HessianFreeKKT(ig_weight=1.0), FullKKT()])
def test_the_implicit_term_s_angle(solver):
    """Against the two gradients themselves: ZeroIG's, and the difference that the solver adds."""
    torch.manual_seed(0)
    model = build_model("one_layer_cnn", SHAPE, 3).double()
    data = images(6)
    batch = ba.Batch(data.x.double(), data.y)
    problem = fastbat.problem(epsilon=0.3, step=0.5)
    anchor = solver.hypergradient(problem, model, batch).solution.anchor
    step = solver.hypergradient(problem, model, batch, anchor)
    direct = ZeroIG().hypergradient(problem, model, batch, anchor).grads
    d = torch.cat([direct[name].flatten() for name in direct])
    i = torch.cat([(step.grads[name] - direct[name]).flatten() for name in direct])
    assert i.norm() > 1e-4 * d.norm()
    assert step.implicit_cosine.item() == pytest.approx((d @ i / (d.norm() * i.norm())).item(), rel=1e-6)
    assert ZeroIG().hypergradient(problem, model, batch, anchor).implicit_cosine.item() == 0


def test_metrics_have_the_angle_and_it_is_zero_without_the_term():
    problem = fastbat.problem(epsilon=0.3, step=0.5)
    with_term = trainer(problem, HessianFreeKKT(ig_weight=1.0), epochs=1).train_epoch(0)
    assert 0 < abs(with_term["implicit_cosine"]) <= 1 and with_term["implicit_ratio"] > 0
    without = trainer(replace(problem), ZeroIG(), epochs=1).train_epoch(0)
    assert without["implicit_cosine"] == without["implicit_ratio"] == 0
    assert all(math.isfinite(v) for v in with_term.values())
