"""Diagnostics of networks against closed forms, independent computations and the definitions they state."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from diagnosing import SHAPE, cnn, images, linear
from torch import nn
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at import diagnose
from bilevel_at.data import Images
from bilevel_at.models import build_model
from bilevel_at.problems import atas, fastat, fastbat, gradalign
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG


@pytest.mark.parametrize("ball", [ba.LinfBall(0.3), ba.L2Ball(1.0)])
def test_gradients_of_a_linear_model_with_two_classes_are_aligned(ball):
    found = diagnose.gradient_alignment(linear(), images(classes=2), ball, samples=3)
    torch.testing.assert_close(found, torch.ones(24))


def test_alignment_is_what_a_computation_example_by_example_gives():
    model, data, ball = cnn().train(), images(), ba.LinfBall(0.2)
    before = copy.deepcopy(model.state_dict())
    found = diagnose.gradient_alignment(model, data, ball, seed=3, batch_size=10)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    g = torch.Generator().manual_seed(3)
    moved = torch.cat([x + 0.2 * (2 * torch.rand(x.shape, generator=g) - 1) for x in data.x.split(10)])
    assert moved.min() < 0 and moved.max() > 1  # the range is not in the definition

    def gradient(x, y):
        x = x[None].clone().requires_grad_()
        F.cross_entropy(model(x), y[None]).backward()
        return x.grad.flatten().numpy()

    pairs = [(gradient(x, y), gradient(m, y)) for x, m, y in zip(data.x, moved, data.y, strict=True)]
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert found.min() < 0.999


def test_alignment_where_gradients_vanish_or_nearly():
    class Flat(nn.Module):
        def forward(self, x):
            x = x.flatten(1)
            level = x.sum(1, keepdim=True)
            return torch.cat([level, -level], 1) * (x[:, :1] > 0.5) * 1e-25

    x = torch.rand(2, *SHAPE)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 0.9, 0.1  # the second has a constant loss
    found = diagnose.gradient_alignment(Flat(), Images(x, torch.zeros(2, dtype=torch.int64), 2), ba.LinfBall(0.1))
    assert found[0] == pytest.approx(1) and found[1].isnan()  # 1e-25 squared is 0 in float32
    assert found.nanmean() == pytest.approx(1)
    with pytest.raises(ba.InputError, match="samples is 0"):
        diagnose.gradient_alignment(Flat(), images(), ba.LinfBall(0.1), samples=0)


@pytest.mark.parametrize("part", [0.0, 0.3, 1.0, 1.25, 2.0])
def test_lemma_1_is_the_second_moment_where_signs_are_independent(part):
    epsilon, step, d, n = 0.3, 0.3 * part, 40, 20_000
    g = np.random.default_rng(0)
    start, sign = g.uniform(-epsilon, epsilon, (n, d)), g.choice([-1, 1], (n, d))
    square = (np.clip(start + step * sign, -epsilon, epsilon) ** 2).sum(1)
    expected = diagnose.lemma_1(epsilon, step, d) ** 2
    # Six standard errors of the mean; where δ is always a corner there is no error but rounding.
    assert abs(square.mean() - expected) <= 6 * square.std() / math.sqrt(n) + 1e-9 * expected
    assert np.sqrt(square).mean() <= math.sqrt(expected) * (1 + 1e-9) + 6 * np.sqrt(square).std() / math.sqrt(n)


def test_lemma_1_at_its_ends_and_outside():
    assert diagnose.lemma_1(0.2, 0.0, 48) == pytest.approx(0.2 * math.sqrt(48 / 3))
    assert diagnose.lemma_1(0.2, 0.4, 48) == pytest.approx(0.2 * math.sqrt(48))
    for epsilon, step, d, said in (
        (0.2, 0.41, 48, "step is 0.41"),
        (0.2, -0.1, 48, "step is -0.1"),
        (0.2, math.nan, 48, "step is nan"),
        (0, 0, 48, "epsilon is 0"),
        (0.2, 0.1, 0, "dimension is 0"),
    ):
        with pytest.raises(ba.InputError, match=said):
            diagnose.lemma_1(epsilon, step, d)


def test_random_steps_on_a_linear_model_are_lemma_1s():
    found = diagnose.random_step_norm(linear(), images(200, 2), 0.3, draws=20)
    assert len(found.steps) == 9 and found.dimension == 36 and not found.bounded
    # A linear model's signs do not depend on η, so ‖δ‖² has Lemma 1's mean. Each of its 36 terms is in 0 … ε², so its
    # standard deviation is at most ε²/2.
    error = 0.3**2 * math.sqrt(36) / 2 / math.sqrt(200 * 20)
    assert (found.square - found.bound() ** 2).abs().max() < 6 * error
    assert (found.mean <= found.bound() * (1 + 1e-6) + 4 * found.error).all()
    assert found.mean[-1] == pytest.approx(0.3 * 6, rel=1e-5)
    inside = diagnose.random_step_norm(linear(), images(200, 2), 0.3, draws=20, bounds=(0, 1))
    assert inside.bounded and (inside.mean < found.mean).all()


def test_lemma_1_does_not_bound_a_loss_that_curves_upwards():
    class Bowl(nn.Module):
        def forward(self, x):
            level = (x - 0.5).square().flatten(1).sum(1, keepdim=True)
            return torch.cat([-level, level], 1)  # the loss of class 0 grows away from 1/2 in every coordinate

    data = Images(torch.full((50, *SHAPE), 0.5), torch.zeros(50, dtype=torch.int64), 2)
    epsilon = step = 0.3
    found = diagnose.random_step_norm(Bowl(), data, epsilon, [step])
    # Every sign is that of η, so |δ| = min(|η| + α, ε), which is ε here.
    assert found.mean.item() == pytest.approx(epsilon * 6, rel=1e-5)
    assert found.bound().item() == pytest.approx(epsilon * 6 * math.sqrt(2 / 3))


def test_the_landscape_of_a_linear_model_is_known():
    model, radius = linear(), 0.5
    x, y = torch.rand(3, *SHAPE), torch.tensor([0, 1, 1])
    found = diagnose.loss_landscape(model, x, y, radius, points=11, seed=5, batch_size=50)
    assert found.loss.shape == found.predicted.shape == found.margin.shape == (3, 11, 11)
    torch.testing.assert_close(found.sign_offsets, torch.linspace(-0.5, 0.5, 11))
    weight, bias = model[1].weight.detach().double(), model[1].bias.detach().double()
    random = 2.0 * torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(5)) - 1
    for i in range(3):
        wrong = 1 - y[i]
        u = weight[wrong] - weight[y[i]]
        at_x = u @ x[i].flatten().double() + bias[wrong] - bias[y[i]]
        a, b = found.sign_offsets.double()[:, None], found.random_offsets.double()[None]
        margin = at_x + a * u.abs().sum() + b * (u @ random[i].flatten().double())
        torch.testing.assert_close(found.margin[i].double(), margin, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.loss[i].double(), F.softplus(margin), atol=1e-5, rtol=1e-4)
        sure = margin.abs() > 1e-4
        assert ((found.predicted[i] == y[i]) == (margin < 0))[sure].all()
    assert (found.predicted != y[:, None, None]).any() and (found.predicted == y[:, None, None]).any()
    torch.testing.assert_close(found.loss[:, 5, 5], F.cross_entropy(model(x), y, reduction="none").detach())


def test_a_landscape_of_one_image_and_of_what_is_none():
    model = cnn().train()
    found = diagnose.loss_landscape(model, torch.rand(SHAPE), 2, 0.1, points=5)
    assert model.training and found.loss.shape == (1, 5, 5) and found.y.tolist() == [2]
    for arguments, said in (
        ((torch.rand(SHAPE), 2, 0.1, 4), "points is 4; it must be odd"),
        ((torch.rand(6, 6), 2, 0.1, 5), "x has shape"),
        ((torch.rand(SHAPE), 2, 0.0, 5), "radius is 0"),
        ((torch.rand(2, *SHAPE), 2, 0.1, 5), "y has shape"),
        ((2 + torch.rand(SHAPE), 2, 0.1, 5), "images lie in"),
        ((torch.rand(SHAPE), 7, 0.1, 5), "label 7 is out of range"),
    ):
        with pytest.raises(ba.InputError, match=said):
            diagnose.loss_landscape(model, *arguments[:3], points=arguments[3])


def test_sizes_of_perturbations_are_counted():
    ball, x = ba.LinfBall(0.25), torch.full((2, 1, 2, 2), 0.5)
    x[0, 0, 0, 0] = 0.9
    delta = torch.tensor([[0.1, 0.25, -0.25, 0.0], [0.05, -0.13, 0.2, 0.25]]).reshape(x.shape)
    found = diagnose.perturbation_sizes(delta, ball, x, bins=5)
    assert found.counts.tolist() == [1, 1, 2, 0, 4] and found.counts.sum() == delta.numel()
    assert found.held.tolist() == [0, 0, 1, 0, 0] and found.at_range == 1 / 8  # 0.9 + 0.1 is the end of the range
    assert (found.at_bound, found.at_zero, found.on_sphere) == (3 / 8, 1 / 8, None)
    torch.testing.assert_close(found.norms, delta.flatten(1).norm(dim=1).double())
    unseen = diagnose.perturbation_sizes(delta, ba.LinfBall(0.25, None), x, bins=5)
    assert unseen.at_range == 0 and torch.equal(unseen.counts, found.counts)


def test_sizes_of_attacks_sum_to_all_coordinates():
    data, model = images(), cnn().eval()
    batch = ba.Batch(data.x, data.y)
    for ball in (ba.LinfBall(0.3), ba.L2Ball(0.7, bounds=(0, 1))):
        attack = ba.Linearized.pgd(ba.minus(ba.cross_entropy), ball, 4, ball.radius / 2, direction=ball.steepest)
        delta = attack.solve(model, batch, generator=torch.Generator().manual_seed(0)).delta
        found = diagnose.perturbation_sizes(delta, ball, data.x, bins=13)
        assert found.counts.sum() == delta.numel() and (found.held <= found.counts).all() and found.at_range > 0
    assert found.on_sphere == 1 and found.at_bound == 0
    signs = torch.randn_like(data.x).sign()
    corners = ba.LinfBall(8 / 255).project(8 / 255 * signs, data.x)
    assert diagnose.perturbation_sizes(corners, ba.LinfBall(8 / 255), data.x).at_bound > 0.8


@pytest.mark.parametrize(
    ("delta", "ball", "x", "said"),
    [
        (torch.full((1, 2), 0.3), ba.LinfBall(0.2), None, "delta reaches 1.5 times"),
        (torch.full((1, 2), 0.2), ba.L2Ball(0.2), None, "delta reaches 1.41421 times"),
        (torch.zeros(1, 2), ba.LinfBall(0), None, "epsilon is 0"),
        (torch.zeros(0, 2), ba.LinfBall(0.2), None, "empty or not finite"),
        (torch.full((1, 2), math.nan), ba.LinfBall(0.2), None, "empty or not finite"),
        (torch.zeros(1, 2), ba.LinfBall(0.2), torch.zeros(2, 2), "must be the same"),
        (torch.zeros(1, 2), ba.Polyhedron(torch.eye(2), torch.ones(2)), None, "is a Polyhedron"),
    ],
)
def test_sizes_of_what_is_no_perturbation(delta, ball, x, said):
    with pytest.raises(ba.InputError, match=said):
        diagnose.perturbation_sizes(delta, ball, x)


def test_a_laplace_filter_is_recognised():
    laplace = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    filters = torch.stack([laplace, -3 * laplace, torch.ones(3, 3), torch.zeros(3, 3)])[None, :, None]
    found = diagnose.laplace_similarity(filters)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([1.0, 1.0, 0.0, math.nan]), equal_nan=True)
    directions = torch.randn(20_000, 3, 3, generator=torch.Generator().manual_seed(0))
    assert diagnose.laplace_similarity(directions).mean() == pytest.approx(0.273, abs=0.01)
    torch.testing.assert_close(
        diagnose.filter_norms(filters), torch.tensor([[math.sqrt(20), 3 * math.sqrt(20), 3.0, 0.0]])
    )
    with pytest.raises(ba.InputError, match="compared with is .*, 3, 3"):
        diagnose.laplace_similarity(torch.zeros(4, 5, 5))


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_a_filter_is_removed_whatever_the_activation(activation):
    torch.manual_seed(0)
    data = images(shape=(3, 6, 6))
    model = build_model("one_layer_cnn", (3, 6, 6), 3, data, activation=activation)
    before = copy.deepcopy(model.state_dict())
    without = diagnose.without_filter(model, 2)
    x = (data.x - model.mean) / model.std
    maps = model.network[1](model.network[0](x))
    maps[:, 2] = 0
    torch.testing.assert_close(without(data.x), model.network[3](maps.flatten(1)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ball = ba.LinfBall(0.2)
    whole, each = diagnose.alignment_by_filter(model, data, ball, seed=1)
    assert whole == pytest.approx(diagnose.gradient_alignment(model, data, ball, seed=1).mean().item())
    assert each[2] == pytest.approx(diagnose.gradient_alignment(without, data, ball, seed=1).mean().item())
    assert len(each) == 4
    with pytest.raises(ba.InputError, match="filter 4 does not exist; this model has filters 0 … 3"):
        diagnose.without_filter(model, 4)
    with pytest.raises(ba.InputError, match="the model is Conv2d, Tanh, BatchNorm2d"):
        diagnose.without_filter(cnn(), 0)


def test_the_kkt_direction_is_that_of_the_sum():
    g = np.random.default_rng(0)
    for scale in (1e-9, 1e-3, 0.5, 1, 40):
        d = g.normal(size=30)
        i = scale * g.normal(size=30)
        ratio, cosine = np.linalg.norm(i) / np.linalg.norm(d), d @ i / np.linalg.norm(i) / np.linalg.norm(d)
        expected = d @ (d + i) / np.linalg.norm(d) / np.linalg.norm(d + i)
        assert diagnose.kkt_direction(ratio, cosine) == pytest.approx(expected, abs=1e-12)
        across = i - d * (i @ d) / (d @ d)
        angle = np.degrees(np.arctan2(np.linalg.norm(across), d @ (d + i) / np.linalg.norm(d)))
        assert diagnose.kkt_angle(ratio, cosine) == pytest.approx(angle, rel=1e-9)
    assert diagnose.kkt_direction(0, 0) == 1 and diagnose.kkt_angle(2, -1) == pytest.approx(180)
    assert math.isnan(diagnose.kkt_direction(1, -1)) and math.isnan(diagnose.kkt_angle(1, -1))
    for ratio, cosine, said in ((-1, 0, "ratio is -1"), (math.inf, 0, "ratio is inf"), (1, 1.1, "cosine is 1.1")):
        with pytest.raises(ba.InputError, match=said):
            diagnose.kkt_direction(ratio, cosine)


def test_solvers_are_compared_at_one_anchor():
    data, model = images(8), cnn().train()
    batch = ba.Batch(data.x, data.y, torch.arange(8))
    problem = fastbat.problem(epsilon=0.3, step=2.0, anchor="uniform")
    solvers = {"zero": ZeroIG(), "free": HessianFreeKKT(), "half": HessianFreeKKT(ig_weight=0.5)}
    state = copy.deepcopy(model.state_dict())
    found = diagnose.compare_solvers(problem, model, batch, solvers, seed=4)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (found["zero"].cosine, found["zero"].ratio) == (pytest.approx(1), 0)
    lower = problem.lower
    anchor, _ = lower.anchor.draw(lower, model, batch, torch.Generator().manual_seed(4))
    rows = {}
    for name, solver in solvers.items():
        step = solver.hypergradient(problem, model, batch, anchor=anchor)
        rows[name] = torch.cat([g.flatten() for g in step.grads.values()]).double()
        assert found[name].norm == pytest.approx(rows[name].norm().item(), rel=1e-5)
        expected = F.cosine_similarity(rows[name], rows["zero"], 0).item()
        assert found[name].cosine == pytest.approx(expected, abs=1e-6)
        ratio = ((rows[name] - rows["zero"]).norm() / rows["zero"].norm()).item()
        assert found[name].ratio == pytest.approx(ratio, abs=1e-5)
    assert found["free"].ratio > 0.01 and found["half"].ratio == pytest.approx(found["free"].ratio / 2, rel=1e-4)
    # The closed form for metrics, from the same two numbers.
    i = rows["free"] - rows["zero"]
    cosine = F.cosine_similarity(i, rows["zero"], 0).item()
    assert diagnose.kkt_direction(found["free"].ratio, cosine) == pytest.approx(found["free"].cosine, abs=1e-5)


def test_sign_attackers_have_one_direction_and_memory_is_left_alone():
    data, model = images(8), cnn()
    batch = ba.Batch(data.x, data.y, torch.arange(8))
    for problem in (fastat.problem(epsilon=0.2), atas.problem(epsilon=0.2), gradalign.problem(epsilon=0.2)):
        found = diagnose.compare_solvers(problem, model, batch, {"free": HessianFreeKKT(), "full": FullKKT()})
        assert all(f.cosine == pytest.approx(1) and f.ratio == 0 for f in found.values())
    remembering = atas.problem(epsilon=0.2)
    before = repr(remembering.state_dict())
    diagnose.compare_solvers(remembering, model, batch, {"zero": ZeroIG()})
    assert repr(remembering.state_dict()) == before
