"""The function evaluate(): what it leaves as it was, what it takes, and mistakes."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from evaluating import EPS, FEW, QUIET, Fixed, accuracy, mlp
from marks import fast
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel_at as ba
from bilevel_at.data import Images
from bilevel_at.evaluate import Attack, EvaluationWarning, attack_from_name, evaluate
from bilevel_at.evaluate.robust import attacked


def test_nothing_else_is_changed(robust):
    model = nn.Sequential(mlp(8), nn.BatchNorm1d(10), nn.Dropout(0.5)).train()
    model[0].eval()  # frozen on purpose
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, rng, other = [m.training for m in model.modules()], torch.get_rng_state(), random.getstate()
    level, sys_trace = logging.getLogger("auto-attack").level, sys.gettrace()
    with pytest.warns(EvaluationWarning, match="left in train mode"):
        evaluate(model, FEW[slice(0, 4)], ["clean", "fgsm", "pgd-2-2", "beta-2", "autoattack"], EPS)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state()) and other == random.getstate()
    assert level == logging.getLogger("auto-attack").level and sys_trace == sys.gettrace()


def test_a_debugger_or_coverage_is_not_switched_off(robust):
    def tracer(*_):
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        attacked(robust, FEW[slice(0, 2)], attack_from_name("apgd-ce", EPS))
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is tracer


def test_the_mode_is_restored_whatever_happens(robust):
    def fail(x):
        raise RuntimeError("stage")

    def progress(*_):
        raise RuntimeError("progress")

    model = nn.Sequential(mlp(8), nn.Dropout(0.5)).train()
    for attack, call in ((Attack("a", ba.LinfBall(0.1), [Fixed(fail)]), None), ("fgsm", progress)):
        with pytest.raises(RuntimeError, match="stage|progress"):
            evaluate(model, FEW, [attack], EPS, progress=call)
        assert all(module.training for module in model.modules())


AROUND = [torch.no_grad, torch.inference_mode, contextlib.nullcontext]


@pytest.mark.parametrize("around", fast(AROUND, [torch.inference_mode]))
def test_under_no_grad_and_without_gradients_of_weights(robust, around):
    frozen = mlp()
    frozen.load_state_dict(robust.state_dict())
    frozen.eval().requires_grad_(False)
    names = ["clean", "fgsm", "pgd-3-2", "pgd-3-1-any", "beta-3", "apgd-ce", "fab-t"]
    want = evaluate(robust, FEW, names, EPS, checks=20)
    with around():
        got = evaluate(frozen, FEW, names, EPS, checks=20)
    assert got.measured == want.measured and all(torch.equal(got.correct(n), want.correct(n)) for n in names)


def test_what_data_may_be(robust):
    want = evaluate(robust, FEW, ["clean", "pgd-3-1"], EPS, **QUIET)
    loader = DataLoader(TensorDataset(FEW.x, FEW.y), batch_size=7)
    for data in ((FEW.x, FEW.y), loader, (FEW.x.clone().requires_grad_(), FEW.y)):
        assert evaluate(robust, data, ["clean", "pgd-3-1"], EPS, **QUIET).worst_case() == want.worst_case()
    half = Images((FEW.x * 255).round().byte(), FEW.y, 10)
    assert evaluate(robust, half, ["clean"], **QUIET)["clean"].n == len(FEW)

    class NoWeights(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10]

    scores = evaluate(NoWeights(), (FEW.x, FEW.y), ["clean", "pgd-3-1", "beta-3", "apgd-ce"], EPS)
    assert len(scores) == 4 and scores["pgd-3-1"].n == 40


def test_names_are_plain_at_one_radius_whatever_the_order(robust):
    assert list(evaluate(robust, FEW, ["pgd-2-1", "clean"], EPS, **QUIET)) == ["pgd-2-1", "clean"]
    assert list(evaluate(robust, FEW, ["fgsm", "clean"], [0.1], **QUIET)) == ["fgsm", "clean"]
    curve = evaluate(robust, FEW, ["clean", "fgsm"], [0.1, 8 / 255], **QUIET)
    assert list(curve) == ["clean", "fgsm@0.1", "fgsm@8/255"] and curve["fgsm@8/255"].epsilon == 8 / 255


class Slab(ba.Constraint):
    """A set of the user's own, which says nothing about steps: δ ≤ 0.1 everywhere."""

    def project(self, delta, x):
        return delta.clamp(max=0.1).clamp(min=-x).minimum(1 - x)


def test_a_lower_problem_of_the_user_s_own(robust):
    polyhedron = ba.Polyhedron(torch.cat([torch.eye(64), -torch.eye(64)]), torch.full((128,), 0.1), bounds=(0, 1))
    for constraint in (ba.LinfBall(0.1), Slab(), polyhedron):
        lower = ba.Linearized.pgd(ba.minus(ba.cross_entropy), constraint, 3, 0.05, start="zero")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mine = evaluate(robust, FEW, ["clean", Attack.solving("mine", lower, restarts=2)], checks=20)
        delta = lower.solve(robust, ba.Batch(FEW.x, FEW.y)).delta
        assert mine["mine"].accuracy == pytest.approx(accuracy(robust, FEW.x + delta, FEW.y))


def test_large_seeds(robust):
    for seed in (2**31, 2**32 - 1):
        scores = evaluate(robust, FEW[slice(0, 3)], ["pgd-2-2", "beta-2", "apgd-ce"], EPS, seed=seed, **QUIET)
        assert scores["pgd-2-2"].seed == seed


X, Y = FEW.x, FEW.y


BAD_DATA = {
    "x has values from -1 to 1; images lie in": (2 * X - 1, Y),
    "x has values from 0 to 16; images lie in": (16 * X, Y),
    "nan": (X.clone().index_fill_(0, torch.tensor([3]), float("nan")), Y),
    "x is torch.uint8; inputs are floating point": ((255 * X).byte(), Y),
    "y is torch.float32 of shape .*; labels are int64": (X, Y.float()),
    "label 19 is out of range": (X, Y + 10),
    "label -1 is out of range": (X, Y - 1),
    "0 inputs and 0 labels": (X[:0], Y[:0]),
    "40 inputs and 3 labels": (X, Y[:3]),
    "pass .x, y. tensors": X,
    "0 |no |empty": FEW[slice(0, 0)],
}


@pytest.mark.parametrize("says", BAD_DATA)
def test_data_that_cannot_be_evaluated(robust, says):
    with pytest.raises(ba.InputError, match=says) as error:
        evaluate(robust, BAD_DATA[says], ["clean", "fgsm"], EPS)
    assert "\n" not in str(error.value)


class Gives(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, x):
        return self.of(x.flatten(1))


@pytest.mark.parametrize("data", [FEW, (FEW.x, FEW.y)], ids=["images", "tensors"])
@pytest.mark.parametrize(
    "of",
    [
        lambda x: x[:, 0],
        lambda x: x[..., None],
        lambda x: x[:1],
        lambda x: (x, x),
        lambda x: x[:, :3],
        lambda x: {"a": x},
    ],
    ids=["[B]", "[B, K, 1]", "[1, K]", "tuple", "too few classes", "dict"],
)
def test_outputs_that_are_not_logits(of, data):
    with pytest.raises(ba.InputError, match="output|label 9 is out of range"):
        evaluate(Gives(of), data, ["clean"], EPS)


NAMES = ["pgd", "pgd-0", "pgd-5-0", "beta-0", "beta-5-top0", "autoatack", "", "PGD-5-1", "pgd-5-1-1", "square-9"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_attacks(robust, name):
    with pytest.raises(ba.InputError, match=f"attack '{name}' is not known; attacks are clean, fgsm, pgd-STEPS"):
        evaluate(robust, FEW, [name], EPS)


@pytest.mark.parametrize(
    ("says", "attacks", "options"),
    [
        ("needs the network 'nowhere'", ["transfer:nowhere"], {}),
        ("transfers 'clean'", ["transfer:nowhere:clean"], {}),
        ("names no attack", [], {}),
        ("needs a radius", ["fgsm"], {"epsilon": None}),
        ("needs a radius", ["fgsm"], {"epsilon": []}),
        ("epsilon is -0.1", ["fgsm"], {"epsilon": -0.1}),
        ("epsilon is nan", ["fgsm"], {"epsilon": float("nan")}),
        ("epsilon is inf", ["fgsm"], {"epsilon": [0.1, float("inf")]}),
        ("epsilon is True", ["fgsm"], {"epsilon": True}),
        ("epsilon", ["fgsm"], {"epsilon": "8/255"}),
        ("norm 'l1' is not known; choose from linf, l2", ["fgsm"], {"norm": "l1"}),
        ("batch_size is 0; it must be at least 1", ["clean"], {"batch_size": 0}),
        ("knows l∞ and l2 balls around images", ["apgd-ce"], {"epsilon": None, "constraint": ba.L2Ball(0.1)}),
        ("checks", ["clean"], {"checks": -1}),
    ],
)
def test_other_mistakes(robust, says, attacks, options):
    with pytest.raises(ba.InputError, match=says) as error:
        evaluate(robust, FEW, attacks, **{"epsilon": EPS, **options})
    assert "\n" not in str(error.value)


def test_too_few_classes_and_images_that_are_no_images():
    three, vectors = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), nn.Linear(6, 5).eval()
    for name in ("autoattack", "apgd-t"):
        with pytest.raises(ba.InputError, match="at least 4 classes, and this one has 3"):
            evaluate(three, (X, Y % 3), [name], 0.0001)
    for name in ("square", "autoattack"):
        with pytest.raises(ba.InputError, match="square"):
            evaluate(vectors, (torch.rand(6, 6), torch.randint(0, 5, (6,))), [name], 0.0001)
    assert evaluate(vectors, (torch.rand(6, 6), torch.randint(0, 5, (6,))), ["apgd-t", "beta-2"], 0.1)


@pytest.mark.parametrize("number", [np.float32(0.1), np.float64(0.1), torch.tensor(0.1), np.array([0.1])])
def test_radii_that_are_numbers_of_other_libraries(robust, number):
    assert evaluate(robust, FEW, ["fgsm"], number, **QUIET)["fgsm"].epsilon == pytest.approx(0.1)
