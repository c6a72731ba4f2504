"""Attacks against references by others and closed forms, records that survive interruptions, and warnings."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from evaluating import EPS, FEW, QUIET, TEST, Fixed, accuracy, cnn, mlp, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bilevel_at as ba
from bilevel_at.data import Images
from bilevel_at.evaluate import Attack, Trace, attack_examples, attack_from_name, ball, evaluate
from bilevel_at.evaluate.ensemble import Component
from bilevel_at.evaluate.robust import attacked
from bilevel_at.evaluate.stages import Descent
from bilevel_at.runs.evaluations import Store
from bilevel_at.testing import strategies as bst
from bilevel_at.train import RunDir


@pytest.fixture(scope="module")
def robust():
    return trained(mlp, "minmax", 15)


@pytest.fixture(scope="module")
def convolutional():
    return trained(cnn, "fastat", 15)


@pytest.fixture(scope="module")
def whole(convolutional):
    """All 360 test images under the strong attacks."""
    return evaluate(convolutional, TEST, ["clean", "fgsm", "pgd-50-10", "beta-30", "autoattack"], EPS, **QUIET)


# --- against attacks by others ----------------------------------------------------------------------------------------


def reference(kind, model, x, y, **settings):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks, the reference, is not installed")
    return getattr(torchattacks, kind)(model, **settings)(x, y)


def test_fgsm_is_that_of_torchattacks(convolutional, whole):
    theirs = reference("FGSM", convolutional, TEST.x, TEST.y, eps=EPS)
    ours = attack_from_name("fgsm", EPS).perturb(convolutional, ba.Batch(TEST.x, TEST.y), torch.Generator())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert whole["fgsm"].accuracy == pytest.approx(accuracy(convolutional, theirs, TEST.y))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_is_that_of_torchattacks(convolutional, norm):
    """From 0, step for step; in l2, where their projection is ball, then range, and ours exact, by accuracy."""
    space, eps, steps = ball(norm, {"linf": EPS, "l2": 1.0}[norm]), {"linf": EPS, "l2": 1.0}[norm], 10
    lower = ba.Linearized(ba.minus(ba.cross_entropy), space, "zero", space.attack_step()[0], eps / 4)
    ours = Attack("pgd", space, [Descent(lower, steps=steps)])
    kind = {"linf": "PGD", "l2": "PGDL2"}[norm]
    theirs = reference(kind, convolutional, TEST.x, TEST.y, eps=eps, alpha=eps / 4, steps=steps, random_start=False)
    found = evaluate(convolutional, TEST, [ours], **QUIET)["pgd"].accuracy
    assert 0.1 < found < 0.9 and found == pytest.approx(accuracy(convolutional, theirs, TEST.y), abs=0.01)
    if norm == "linf":
        batch = ba.Batch(TEST.x, TEST.y)
        same = (ours.perturb(convolutional, batch, torch.Generator()) - theirs).flatten(1).abs().amax(1) < 1e-5
        assert same.float().mean() > 0.99  # the sign of a gradient of 1e-12 may differ


def test_random_restarts_of_pgd_against_torchattacks(convolutional):
    theirs = torch.ones(len(TEST), dtype=torch.bool)
    for _ in range(5):  # one restart more or less moves this by a percent
        moved = reference("PGD", convolutional, TEST.x, TEST.y, eps=EPS, alpha=EPS / 4, steps=40)
        with torch.no_grad():
            theirs &= convolutional(moved).argmax(1) == TEST.y
    ours = evaluate(convolutional, TEST, ["pgd-40-5"], EPS, **QUIET)["pgd-40-5"].accuracy
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


# --- AutoAttack -------------------------------------------------------------------------------------------------------


def direct(model, images, part=None, norm="Linf", eps=EPS, version="standard", batch_size=8):
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, norm=norm, eps=eps, version=version, seed=0)
    attack.logger.setLevel(logging.ERROR)
    if part:
        attack.attacks_to_run = [part]
    attacked, said = attack.run_standard_evaluation(images.x, images.y, batch_size=batch_size)
    with torch.no_grad():
        return model(attacked).argmax(1) == images.y, said


@pytest.mark.parametrize("part", ["autoattack", "apgd-ce", "apgd-t", "fab-t", "square"])
def test_autoattack_through_our_door_is_autoattack(robust, part):
    images = FEW[slice(0, 14)]
    trace = attacked(robust, images, attack_from_name(part, EPS), batch_size=8)
    stands, said = direct(robust, images, None if part == "autoattack" else part)
    assert torch.equal(trace.correct, stands) and torch.equal(trace.said, said) and trace.outside == 0
    assert 0 < stands.sum() < accuracy(robust, images.x, images.y) * len(images)


def test_the_version_for_random_networks_in_l2(robust):
    images = TEST[slice(0, 12)]
    trace = attacked(robust, images, attack_from_name("autoattack-rand", ball("l2", 0.8)), batch_size=8)
    stands, said = direct(robust, images, norm="L2", eps=0.8, version="rand", batch_size=8)
    assert torch.equal(trace.correct, stands) and torch.equal(trace.said, said)


def test_beta_in_l2_is_no_weaker_than_pgd(robust):
    result = evaluate(robust, TEST, ["pgd-50-10", "beta-30", "apgd-t"], 1.0, norm="l2", **QUIET)
    assert result["beta-30"].accuracy <= result["pgd-50-10"].accuracy
    assert result["beta-30"].accuracy == pytest.approx(result["apgd-t"].accuracy, abs=0.02)


def test_beta_is_no_weaker_than_pgd_and_close_to_autoattack(whole):
    assert whole["beta-30"].accuracy <= whole["pgd-50-10"].accuracy
    assert whole["beta-30"].accuracy == pytest.approx(whole["autoattack"].accuracy, abs=0.015)
    assert whole["autoattack"].accuracy <= whole["pgd-50-10"].accuracy < whole["clean"].accuracy


# --- where the optimum is known ---------------------------------------------------------------------------------------


def linear(classes, norm, n=80, seed=0):
    """A linear network, images whose range never binds, a radius, and whether each withstands the best attack of it."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, classes)).eval().requires_grad_(False)
    model[1].weight.copy_(torch.randn(model[1].weight.shape, generator=g))
    model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    x = 0.2 + 0.6 * torch.rand((4 * n, 1, 6, 6), generator=g)
    out = model(x)
    y = out.argmax(1)
    gaps = out.gather(1, y[:, None]) - out
    normals = model[1].weight[y][:, None] - model[1].weight[None]
    length = normals.abs().sum(2) if norm == "linf" else normals.norm(dim=2)
    margin = (gaps / length).scatter(1, y[:, None], torch.inf).amin(1)
    radius = margin.median().item()
    kept = ((margin - radius).abs() > 1e-3).nonzero().flatten()[:n]
    assert radius < 0.2 and 0.3 < (margin[kept] > radius).float().mean() < 0.7
    return model, Images(x[kept], y[kept], classes), radius, margin[kept] > radius


UNTARGETED = ["fgsm", "pgd-50-1", "pgd-30-3-any", "apgd-ce", "fab", "beta-30"]
TARGETED = ["beta-30", "beta-30-top2", "apgd-t", "fab-t", "autoattack", "autoattack-plus"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("classes", "name"), [(2, n) for n in UNTARGETED] + [(5, n) for n in TARGETED])
def test_a_linear_network_is_attacked_to_the_exact_accuracy(norm, classes, name):
    model, images, radius, stands = linear(classes, norm, n=40 if "auto" in name else 80)
    trace = attacked(model, images, attack_from_name(name, ball(norm, radius)))
    assert (trace.correct != stands).sum() == 0 and trace.outside == 0


def test_pgd_with_few_steps_on_a_linear_network():
    """In l∞ ten steps of ε/4 reach the corner from anywhere; in l2 the start is not quite forgotten."""
    for norm, most in (("linf", 0), ("l2", 2)):
        model, images, radius, stands = linear(2, norm)
        found = attacked(model, images, attack_from_name("pgd-10-3-any", ball(norm, radius))).correct
        assert (found | ~stands).all() and (found != stands).sum() <= most


def test_square_on_a_linear_network():
    """It breaks nothing that cannot be broken, and not all that can: it never changes the last row and column, say."""
    for norm in ("linf", "l2"):
        model, images, radius, stands = linear(5, norm)
        found = attacked(model, images, attack_from_name("square", ball(norm, radius))).correct
        assert (found | ~stands).all() and (~found).sum() > 0.3 * (~stands).sum()


@settings(max_examples=25)
@given(seed=bst.seeds, low=st.floats(0.001, 0.1), more=st.floats(0.001, 0.1), norm=st.sampled_from(["linf", "l2"]))
def test_accuracy_falls_with_the_radius(seed, low, more, norm):
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)).eval()
    x = torch.rand((30, 6), generator=g)
    with torch.no_grad():
        y = model(x).argmax(1)
    result = evaluate(model, (x, y), ["clean", "pgd-20-1"], [low, low + more], norm=norm, **QUIET)
    clean, small, large = (score.accuracy for score in result.values())
    assert 1 == clean >= small >= large
    if norm == "linf":  # clipping leaves the best corner the best corner
        at_once = evaluate(model, (x, y), ["fgsm"], low, **QUIET)["fgsm"].accuracy
        assert at_once == small


@settings(max_examples=40)
@given(
    name=st.sampled_from(["fgsm", "pgd-3-2", "pgd-3-2-any", "beta-3", "beta-2-2-top1", "apgd-ce", "fab-t"]),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.one_of(st.just(0.0), st.floats(1e-4, 3.0)),
    seed=bst.seeds,
)
def test_attacked_images_lie_in_the_ball_and_in_the_range(name, norm, eps, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand((4, 1, 2, 3), generator=g).mul(1.4).sub(0.2).clamp(0, 1)
    y = torch.randint(0, 4, (4,), generator=g)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).eval()
    attack = attack_from_name(name, ball(norm, eps))
    found = attack.perturb(model, ba.Batch(x, y), g)
    delta = (found - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert found.shape == x.shape and size.max() <= eps + 1e-6 * max(1, eps)
    assert found.min() >= 0 and found.max() <= 1
    assert attacked(model, Images(x, y, 4), attack).outside == 0


# --- restarts, steps, unions, records ---------------------------------------------------------------------------------


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


def quick_autoattack():
    """The cheaper parts of AutoAttack; all of it is interrupted in test_evaluate_command.py."""
    parts = [Component(part, "linf", EPS) for part in ("apgd-ce", "apgd-dlr")]
    return Attack("autoattack", ba.LinfBall(EPS), [*parts, Component("square", "linf", EPS, queries=50)])


def attack_to_interrupt(name):
    return quick_autoattack() if name == "autoattack" else attack_from_name(name, EPS)


INTERRUPTED = pytest.mark.parametrize(("name", "n"), [("pgd-5-3", 40), ("beta-5-2", 20), ("autoattack", 20)])


@INTERRUPTED
def test_an_interrupted_attack_goes_on_to_the_same_end(robust, tmp_path, name, n):
    images, attack = FEW[slice(0, n)], attack_to_interrupt(name)
    unbroken = attacked(robust, images, attack, seed=3, batch_size=16)
    batches = sum(1 for _ in attack_examples(robust, images, attack, seed=3, batch_size=16))
    assert batches > len(attack.stages)
    for k in range(batches + 1):
        trace = Trace.start(n)
        some = attack_examples(robust, images, attack, seed=3, batch_size=16, trace=trace)
        for _ in range(k):
            next(some)
        some.close()
        np.savez(tmp_path / "trace.npz", **trace.arrays())
        with np.load(tmp_path / "trace.npz", allow_pickle=False) as arrays:
            again = Trace.from_arrays(arrays)
        rest = list(attack_examples(robust, images, attack, seed=3, batch_size=16, trace=again))
        assert len(rest) == batches - k
        assert torch.equal(again.broken, unbroken.broken) and torch.equal(again.said, unbroken.said), k
        assert again.seconds >= trace.seconds


def counted(model):
    calls = [0]

    def count(*_):
        calls[0] += 1

    return calls, model.register_forward_hook(count)


@INTERRUPTED
def test_a_store_goes_on_wherever_it_was_stopped(robust, tmp_path, name, n):
    images, attack = FEW[slice(0, n)], attack_to_interrupt(name)
    settings = {"usual": EPS, "seed": 3, "batch_size": 16}
    unbroken = attacked(robust, images, attack, seed=3, batch_size=16)
    batches = sum(1 for _ in attack_examples(robust, images, attack, seed=3, batch_size=16))
    for k in range(1, batches + 1):
        run, said = RunDir(tmp_path / str(k)), []

        def stop(*state, said=said, k=k):
            said.append(state)
            if len(said) == k:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Store(run, "best", robust, images, **settings).score(attack, stop)
        assert not (run.path / "results.json").exists()
        store = Store(run, "best", robust, images, **settings)
        key, score = store.score(attack, stop)
        assert len(said) == batches
        assert torch.equal(store.traces[key].broken, unbroken.broken) and torch.equal(
            store.traces[key].said, unbroken.said
        )
        assert score.accuracy == unbroken.correct.float().mean().item()
    calls, hook = counted(robust)
    with hook:
        assert Store(run, "best", robust, images, **settings).score(attack) == (key, score)
    assert calls == [0]


def test_what_a_store_reuses_and_what_not(robust, tmp_path):
    run, half = RunDir(tmp_path), FEW[slice(0, 20)]

    def score(model=robust, images=FEW, eps=EPS, name="pgd-3-2", again=False, **options):
        store = Store(run, "best", model, images, **{"usual": EPS, "batch_size": 16, **options})
        calls, hook = counted(model)
        with hook:
            key, score = store.score(attack_from_name(name, eps), again=again)
        expected = attacked(model, images, attack_from_name(name, eps), seed=options.get("seed", 0), batch_size=16)
        assert torch.equal(store.traces[key].broken, expected.broken)
        assert store.results()["best"][key] == score.asdict()
        with np.load(tmp_path / score.file, allow_pickle=False) as arrays:
            assert arrays["label"].tolist() == images.y.tolist()
            assert arrays["correct"].tolist() == expected.correct.tolist() and arrays["correct"].dtype == bool
        return key, calls[0] > 0

    assert score() == ("pgd-3-2", True) and score() == ("pgd-3-2", False)
    assert score(again=True) == ("pgd-3-2", True)
    key, computed = score(eps=0.1)
    assert computed and key.startswith("pgd-3-2@") and score() == ("pgd-3-2", False)
    assert score(eps=0.1) == (key, False)
    key, computed = score(images=half)
    assert computed and key == "pgd-3-2[n=20]" and score(images=half) == (key, False) and score() == ("pgd-3-2", False)
    relabelled = Images(FEW.x, FEW.y.roll(1), 10)
    for change in ({"seed": 1}, {"model": trained(mlp, "standard", 3)}, {"images": relabelled}):
        assert score(**change)[1] and not score(**change)[1]
    assert score(model=trained(mlp, "minmax", 1))[1]
    score()
    for damage in (b"", b"PK", b"not a file of arrays", next(tmp_path.rglob("*.npz")).read_bytes()[:200]):
        (tmp_path / "evaluation/best/pgd-3-2.npz").write_bytes(damage)
        assert score() == ("pgd-3-2", True)


def test_a_state_file_of_one_array_or_of_objects_is_not_used(robust, tmp_path):
    """What np.load opens, but not as an archive, or only by unpickling."""
    store, attack = Store(RunDir(tmp_path), "best", robust, FEW, usual=EPS), attack_from_name("pgd-2-1", EPS)
    _, first = store.score(attack)
    path = tmp_path / first.file
    with np.load(path) as arrays:
        kept = dict(arrays)
    changes = [{name: np.array([{}], dtype=object)} for name in ("broken", "said", "position", "identity")]
    changes += [{"position": np.array([9, 0, 0])}, {"position": np.array([1])}, {"broken": np.array(["a"] * len(FEW))}]
    changes += [{"broken": kept["broken"][:5], "said": kept["said"][:5]}, {"identity": np.array("{}")}]
    changes += [{"seconds": np.array("soon")}, {"broken": np.array(3), "said": np.array(3)}]
    for change in changes:
        with open(path, "wb") as file:
            np.savez(file, **{**kept, **change})
        assert store.score(attack)[1].accuracy == first.accuracy
        with np.load(path, allow_pickle=False) as arrays:
            assert (arrays["broken"] == kept["broken"]).all()
    for array in (np.zeros(3), np.array([{}], dtype=object)):
        with open(path, "wb") as file:
            np.save(file, array, allow_pickle=True)
        assert store.score(attack)[1].accuracy == first.accuracy


def test_results_of_another_norm_are_kept_apart(robust, tmp_path):
    """An l2 result of the same attack, at the same or the only radius, does not take the place of the l∞ one."""
    store = Store(RunDir(tmp_path), "best", robust, FEW, usual=EPS)
    keys = [store.score(attack_from_name("pgd-2-1", ball(norm, EPS)))[0] for norm in ("linf", "l2")]
    assert len(set(keys)) == 2 and {e["norm"] for e in store.results()["best"].values()} == {"linf", "l2"}


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


def test_results_of_weights_that_are_gone_are_dropped(robust, tmp_path):
    """A run that was trained on: what is known of the old checkpoint says nothing of the new one."""
    other = mlp().eval()
    for model in (robust, other):
        store = Store(RunDir(tmp_path), "best", model, FEW, usual=EPS)
        for name in ("clean", "fgsm") if model is robust else ("clean",):
            store.score(attack_from_name(name, EPS))
    assert set(store.results()["best"]) == {"clean"}


def test_a_polyhedron_is_reached_by_steps_as_a_ball_is(robust):
    """The box as a polyhedron: PGD gets about as far in it as in the ball that it is; with steps of the distance of a
    face it left 15 % of the images more."""
    box = ba.Polyhedron(torch.cat([torch.eye(64), -torch.eye(64)]), torch.full((128,), EPS), bounds=(0, 1))
    at = {
        c: evaluate(robust, FEW, [attack_from_name("pgd-50-1", c)], **QUIET)["pgd-50-1"]
        for c in (box, ba.LinfBall(EPS))
    }
    assert at[box].accuracy <= at[ba.LinfBall(EPS)].accuracy + 0.05
