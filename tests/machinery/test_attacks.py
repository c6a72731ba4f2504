"""Attacks against those of others: foolbox, pyautoattack, and BETA's algorithm as it is printed."""

from __future__ import annotations

import logging

import pytest
import torch
from evaluating import EPS, FEW, QUIET, TEST, Fixed, accuracy, mlp
from marks import fast
from torch import nn

import bilevel_at as ba
from bilevel_at.data import Images
from bilevel_at.evaluate import Attack, attack_from_name, ball, evaluate
from bilevel_at.evaluate.robust import attacked
from bilevel_at.evaluate.stages import Descent


@pytest.fixture(scope="module")
def whole(convolutional):
    """All 360 test images under the strong attacks."""
    return evaluate(convolutional, TEST, ["clean", "fgsm", "pgd-50-10", "beta-30", "autoattack"], EPS, **QUIET)


def reference(kind, model, x, y, eps, **settings):
    """What an attack of foolbox makes of images."""
    foolbox = pytest.importorskip("foolbox", reason="foolbox, the reference, is not installed: pip install foolbox")
    attack = getattr(foolbox.attacks, kind)(**settings)
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps)[1]


def test_fgsm_is_that_of_foolbox(convolutional):
    theirs = reference("LinfFastGradientAttack", convolutional, TEST.x, TEST.y, EPS)
    ours = attack_from_name("fgsm", EPS).perturb(convolutional, ba.Batch(TEST.x, TEST.y), torch.Generator())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    found = evaluate(convolutional, TEST, ["fgsm"], EPS, **QUIET)["fgsm"].accuracy
    assert found == pytest.approx(accuracy(convolutional, theirs, TEST.y))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_is_that_of_foolbox(convolutional, norm):
    """From 0, step for step; in l2, where their projection is ball, then range, and ours exact, by accuracy."""
    space, eps, steps = ball(norm, {"linf": EPS, "l2": 1.0}[norm]), {"linf": EPS, "l2": 1.0}[norm], 10
    lower = ba.Linearized(ba.minus(ba.cross_entropy), space, "zero", space.steepest, eps / 4)
    ours = Attack("pgd", space, [Descent(lower, steps=steps)])
    kind = {"linf": "LinfBasicIterativeAttack", "l2": "L2BasicIterativeAttack"}[norm]
    theirs = reference(kind, convolutional, TEST.x, TEST.y, eps, abs_stepsize=eps / 4, steps=steps, random_start=False)
    found = evaluate(convolutional, TEST, [ours], **QUIET)["pgd"].accuracy
    assert 0.1 < found < 0.9 and found == pytest.approx(accuracy(convolutional, theirs, TEST.y), abs=0.01)
    if norm == "linf":
        batch = ba.Batch(TEST.x, TEST.y)
        same = (ours.perturb(convolutional, batch, torch.Generator()) - theirs).flatten(1).abs().amax(1) < 1e-5
        assert same.float().mean() > 0.99  # the sign of a gradient of 1e-12 may differ


@pytest.mark.slow
def test_random_restarts_of_pgd_against_foolbox(convolutional):
    theirs = torch.ones(len(TEST), dtype=torch.bool)
    for _ in range(10):
        moved = reference("LinfPGD", convolutional, TEST.x, TEST.y, EPS, abs_stepsize=EPS / 4, steps=40)
        with torch.no_grad():
            theirs &= convolutional(moved).argmax(1) == TEST.y
    ours = evaluate(convolutional, TEST, ["pgd-40-10"], EPS, **QUIET)["pgd-40-10"].accuracy
    assert ours == pytest.approx(theirs.float().mean().item(), abs=0.01)


def beta_by_the_book(model, batch, constraint, steps, radius, seed):
    """Algorithm 1, a class of an example at a time: RMSprop on M_j, projection, and the widest margin on the way.

    In an l2 ball the steps go along the gradient, rate times its direction.
    In l∞, from ten steps on, five starts share two thirds of them; the rest go on from where M_j was largest, at a
    quarter of the rate.
    """
    classes = model(batch.x).shape[1]
    g, wide = torch.Generator().manual_seed(seed), batch.x.repeat_interleave(classes - 1, 0)
    several = steps >= 10 and isinstance(constraint, ba.LinfBall)
    starts = [constraint.sample(wide, g) for _ in range(5 if several else 1)]
    short = 2 * steps // 15
    legs = [(short, radius / 2)] * 5 + [(steps - 5 * short, radius / 8)]
    legs = legs if several else [(steps, radius / 2)]
    found = []
    for i, (x, y) in enumerate(zip(batch.x, batch.y, strict=True)):
        widest, worst = -torch.inf, None
        for k, j in enumerate(j for j in range(classes) if j != y):
            aimed, nearest = -torch.inf, None
            for leg, (count, rate) in enumerate(legs):
                start = starts[leg][i * (classes - 1) + k] if leg < len(starts) else nearest
                eta = nn.Parameter(start.clone())
                optimizer = torch.optim.RMSprop([eta], lr=rate)
                for t in range(count + 1):
                    out = model((x + eta)[None])[0]
                    margins = {c: (out[c] - out[y]).item() for c in range(classes) if c != y}
                    if max(margins.values()) > widest:
                        widest, worst = max(margins.values()), (x + eta).detach().clone()
                    if margins[j] > aimed:
                        aimed, nearest = margins[j], eta.detach().clone()
                    if t < count:
                        optimizer.param_groups[0]["lr"] = rate * (1 - t / count * (1 - 1 / count))
                        optimizer.zero_grad()
                        (out[y] - out[j]).backward()
                        if isinstance(constraint, ba.L2Ball):
                            eta.data -= optimizer.param_groups[0]["lr"] * eta.grad / eta.grad.norm()
                        else:
                            optimizer.step()
                        eta.data = constraint.project(eta.data[None], x[None])[0]
        found.append(worst)
    return torch.stack(found)


@pytest.mark.parametrize("steps", [6, 13])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_beta_is_algorithm_1(robust, norm, steps):
    model = mlp().double()
    model.load_state_dict(robust.state_dict())
    batch, radius = ba.Batch(TEST.x[:4].double(), TEST.y[:4]), {"linf": 0.1, "l2": 0.5}[norm]
    (stage,) = attack_from_name(f"beta-{steps}", ball(norm, radius)).stages
    ours = stage(model, batch, torch.Generator().manual_seed(7))
    torch.testing.assert_close(ours, beta_by_the_book(model, batch, ball(norm, radius), steps, radius, 7))


def direct(model, images, part=None, norm="Linf", eps=EPS, version="standard", batch_size=8):
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, norm=norm, eps=eps, version=version, seed=0)
    attack.logger.setLevel(logging.ERROR)
    if part:
        attack.attacks_to_run = [part]
    attacked, said = attack.run_standard_evaluation(images.x, images.y, batch_size=batch_size)
    with torch.no_grad():
        return model(attacked).argmax(1) == images.y, said


@pytest.mark.parametrize("part", fast(["autoattack", "apgd-ce", "apgd-t", "fab-t", "square"], ["autoattack"]))
def test_autoattack_through_our_door_is_autoattack(robust, part):
    images = FEW[slice(0, 10)]
    trace = attacked(robust, images, attack_from_name(part, EPS), batch_size=8)
    stands, said = direct(robust, images, None if part == "autoattack" else part)
    assert torch.equal(trace.correct, stands) and torch.equal(trace.said, said) and trace.outside == 0
    assert 0 < stands.sum() < accuracy(robust, images.x, images.y) * len(images)


@pytest.mark.slow
def test_the_version_for_random_networks_in_l2(robust):
    images = TEST[slice(0, 12)]
    trace = attacked(robust, images, attack_from_name("autoattack-rand", ball("l2", 0.8)), batch_size=8)
    stands, said = direct(robust, images, norm="L2", eps=0.8, version="rand", batch_size=8)
    assert torch.equal(trace.correct, stands) and torch.equal(trace.said, said)


@pytest.mark.slow
def test_beta_in_l2_is_no_weaker_than_pgd(robust):
    result = evaluate(robust, TEST, ["pgd-50-10", "beta-30", "apgd-t"], 1.0, norm="l2", **QUIET)
    assert result["beta-30"].accuracy <= result["pgd-50-10"].accuracy
    assert result["beta-30"].accuracy == pytest.approx(result["apgd-t"].accuracy, abs=0.02)


@pytest.mark.slow
def test_beta_is_no_weaker_than_pgd_and_close_to_autoattack(whole):
    assert whole["beta-30"].accuracy <= whole["pgd-50-10"].accuracy
    assert whole["beta-30"].accuracy == pytest.approx(whole["autoattack"].accuracy, abs=0.015)
    assert whole["autoattack"].accuracy <= whole["pgd-50-10"].accuracy < whole["clean"].accuracy


@pytest.mark.parametrize(
    ("name", "batch_size"), [("pgd-5-3", 250), ("pgd-5-3", 3), ("pgd-5-3-any", 250), ("fgsm", 250)]
)
def test_a_trace_keeps_the_first_images_as_they_were_attacked(name, batch_size, robust):
    """Of the stage that broke an example, or of the last."""
    with torch.no_grad():
        wrong = robust(TEST.x).argmax(1) != TEST.y
    images = TEST[torch.cat([wrong.nonzero()[:2, 0], (~wrong).nonzero()[:30, 0]])]
    trace = attacked(robust, images, attack_from_name(name, EPS), batch_size=batch_size)
    x, y = images[slice(0, 8)].pixels(), images.y[:8]
    assert {0, 1, -1} <= {*trace.broken[:8].tolist()}  # there are examples of each kind
    delta = trace.pictured - x
    assert delta.abs().max() <= EPS + 1e-6 and trace.pictured.min() >= 0 and trace.pictured.max() <= 1
    assert torch.equal(delta.flatten(1).any(1), trace.broken[:8] != 0)
    with torch.no_grad():
        answer = robust(trace.pictured).argmax(1)
    assert torch.equal(answer == y, trace.correct[:8])
    assert torch.equal(answer[~trace.correct[:8]], trace.said[:8][~trace.correct[:8]])
    few = attacked(robust, images[slice(0, 3)], attack_from_name(name, EPS), batch_size=batch_size)
    assert few.pictured.shape == (3, *x.shape[1:])


def test_restarts_steps_and_unions(robust):
    one, three, any_step = (
        attacked(robust, TEST, attack_from_name(name, EPS)) for name in ("pgd-5-1", "pgd-5-3", "pgd-5-1-any")
    )
    assert torch.equal(one.broken.clamp(max=1), three.broken.where(three.broken <= 1, -1))  # the first restart is it
    assert {0, 1, 2} <= set(three.broken.tolist()) <= {-1, 0, 1, 2, 3}
    assert not (three.correct & ~one.correct).any() and not (any_step.correct & ~one.correct).any()
    assert any_step.correct.sum() <= one.correct.sum()
    with torch.no_grad():
        clean = robust(TEST.x).argmax(1)
    assert torch.equal(three.broken == 0, clean != TEST.y)
    assert torch.equal(three.said.where(three.broken < 1, TEST.y), clean.where(three.broken < 1, TEST.y))
    assert torch.equal(three.said == TEST.y, three.correct)
    result = evaluate(robust, TEST, ["pgd-5-1", "beta-3", "fgsm"], EPS, **QUIET)
    union = (result.correct("pgd-5-1") & result.correct("beta-3") & result.correct("fgsm")).float().mean().item()
    assert result.worst_case() == union <= min(score.accuracy for score in result.values())
    assert union <= result.worst_case("pgd-5-1", "fgsm") <= result.worst_case("fgsm") == result["fgsm"].accuracy


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "move",
    [lambda x: 1 - x, lambda x: x - 0.05, lambda x: x * float("nan"), lambda x: x + float("inf")],
    ids=["far", "outside [0, 1]", "nan", "inf"],
)
def test_what_leaves_the_ball_does_not_count(norm, move):
    """A network that says "not 1" to everything but images that are as they should be."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(False)
    model[1].weight.zero_(), model[1].bias.zero_()
    model[1].weight[1] = 1.0
    model[1].bias[2] = FEW.x.flatten(1).sum(1).min().item() - 1e-3
    images = Images(FEW.x, torch.ones_like(FEW.y), 10)
    cheat = Attack("cheat", ball(norm, 0.1 if norm == "linf" else 0.3), [Fixed(move)])
    result = evaluate(model, images, [cheat], **QUIET)
    assert result["cheat"].accuracy == 1.0
    honest = Attack("honest", ball(norm, 0.1), [Fixed(lambda x: x.clone())])
    assert evaluate(model, images, [honest], **QUIET)["honest"].outside == 0


def test_a_polyhedron_is_reached_by_steps_as_a_ball_is(robust):
    """The box as a polyhedron: PGD gets about as far in it as in the ball that it is; with steps of the distance of a
    face it left 15 % of the images more."""
    box = ba.Polyhedron(torch.cat([torch.eye(64), -torch.eye(64)]), torch.full((128,), EPS), bounds=(0, 1))
    at = {
        c: evaluate(robust, FEW, [attack_from_name("pgd-50-1", c)], **QUIET)["pgd-50-1"]
        for c in (box, ba.LinfBall(EPS))
    }
    assert at[box].accuracy <= at[ba.LinfBall(EPS)].accuracy + 0.05
