"""The networks have the published sizes; a step costs what its passes cost, and nothing is computed twice."""

from __future__ import annotations

import sys

import pytest
import torch
from marks import fast
from torch.utils.flop_counter import FlopCounterMode

import bilevel_at as ba
from bilevel_at.models import MODELS, build_model
from bilevel_at.problems import (
    asgd_bca,
    atas,
    atta,
    awp,
    fastat,
    fastbat,
    fgsm,
    fgsm_pgi,
    fgsm_sdi,
    free,
    gat,
    gradalign,
    liet,
    mart,
    minmax,
    nfgsm,
    nuat,
    qub,
    remembered_fastbat,
    sgd_bca,
    ssat,
    standard,
    subat,
    tdat,
    trades,
    yopo,
    zerograd,
)
from bilevel_at.solvers import HessianFreeKKT, ZeroIG

# Ten classes, 3×32×32. WideResNets: Zagoruyko and Komodakis (2016), Table 4 (11.0M, 36.5M) and the 46.2M that the
# adversarial training literature quotes for 34-10; ResNets and PreActResNets in the form of its common code.
PARAMETERS = {
    "preact_resnet18": 11_171_146,
    "preact_resnet34": 21_279_306,
    "preact_resnet50": 23_509_066,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "wide_resnet16_8": 10_961_370,
    "wide_resnet28_10": 36_479_194,
    "wide_resnet34_10": 46_160_474,
    "one_layer_cnn": 4 * 28 + 10 * (4 * 32 * 32 + 1),
}
# A thousand classes, 3×224×224: torchvision's documentation of each.
IMAGENET = {"imagenet_resnet18": 11_689_512, "imagenet_resnet34": 21_797_672, "imagenet_resnet50": 25_557_032}


LARGE = {
    "wide_resnet28_10",
    "wide_resnet34_10",
    "imagenet_resnet34",
    "imagenet_resnet50",
    "resnet50",
    "preact_resnet50",
}


@pytest.mark.parametrize("name", fast(MODELS, set(MODELS) - LARGE))
def test_parameter_counts(name):
    if name in IMAGENET:
        model = build_model(name, (3, 224, 224), 1000)
        assert sum(p.numel() for p in model.parameters()) == IMAGENET[name]
        assert build_model(name, (3, 64, 64), 3).eval()(torch.rand(2, 3, 64, 64)).shape == (2, 3)
        return
    model = build_model(name, (3, 32, 32), 10)
    if name in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    if name.endswith(("18", "cnn", "16_8")):
        assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    if name.endswith("cnn"):
        assert build_model(name, (1, 28, 28), 7)(torch.rand(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize("name", ["preact_resnet18", "imagenet_resnet18"])
@pytest.mark.parametrize("activation", ["relu", "softplus", "swish"])
def test_activations(name, activation):
    model = build_model(name, (3, 32, 32), 4, activation=activation).eval()
    kinds = {type(m).__name__ for m in model.modules()} & {"ReLU", "Softplus", "SiLU"}
    assert kinds == {{"relu": "ReLU", "softplus": "Softplus", "swish": "SiLU"}[activation]}
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 3])
    # with the published step 5000/255 every coordinate may be at a bound, and the implicit term 0
    step = HessianFreeKKT().backward(fastbat.problem(step=0.01), model, ba.Batch(x, y))
    assert step.loss.isfinite() and step.implicit_norm > 0


def test_dropout_stands_between_the_convolutions_of_wide_blocks():
    model = build_model("wide_resnet16_8", (3, 8, 8), 4, dropout=0.3)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.3] * 6
    x = torch.rand(2, 3, 8, 8)
    assert not torch.equal(model.train()(x), model(x)) and torch.equal(model.eval()(x), model(x))
    with pytest.raises(ba.InputError, match="model resnet18 has no dropout; the wide residual networks do"):
        build_model("resnet18", (3, 8, 8), 4, dropout=0.3)


def test_unknown_names():
    with pytest.raises(ba.InputError, match="model 'vgg' is not known"):
        build_model("vgg", (3, 32, 32), 10)
    with pytest.raises(ba.InputError, match="activation 'gelu' is not known; choose from relu, softplus, swish"):
        build_model("small_cnn", (3, 32, 32), 10, activation="gelu")


def test_a_network_of_timm_where_timm_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it fails
    with pytest.raises(ba.InputError, match="model timm:resnet18 is of timm, which is not installed: pip install timm"):
        build_model("timm:resnet18", (3, 32, 32), 10)


def flops(problem, solver, model, batch):
    for p in model.parameters():
        p.grad = None
    with FlopCounterMode(display=False) as counter:
        solver.backward(problem, model, batch)
    return counter.get_total_flops()


# passes / 3: forward 1, backward to the input 1, backward to the parameters too 2, double backward 4
COSTS = {
    "FGSM": (fgsm.problem(), ZeroIG(), 1.68),
    "Fast-AT": (fastat.problem(), ZeroIG(), 1.68),
    "Fast-AT under a KKT solver": (fastat.problem(), HessianFreeKKT(), 1.68),
    "ATTA": (atta.problem(), ZeroIG(), 1.68),
    "ATAS": (atas.problem(), ZeroIG(), 1.68),
    "SGD_BCA": (sgd_bca.problem(), ZeroIG(), 1.68),
    "A-SGD_BCA": (asgd_bca.problem(), ZeroIG(), 1.68),
    "PGD-2": (minmax.problem(steps=2), ZeroIG(), 1 + 2 * 2 / 3 + 0.01),
    "PGD-10": (minmax.problem(), ZeroIG(), 1 + 2 * 10 / 3 + 0.01),
    "GradAlign": (gradalign.problem(), ZeroIG(), 3.75),
    # + a step (2), and a clean gradient that is not held constant (its own 2, and double backward 4)
    "GradAlign on PGD-2": (gradalign.problem(steps=2), ZeroIG(), 3.75 + 8 / 3),
    "Fast-BAT": (fastbat.problem(), HessianFreeKKT(), 3.72),
    "Fast-BAT without its implicit term": (fastbat.problem(), ZeroIG(), 1 + 2 * 2 / 3 + 0.01),
    "Fast-BAT from remembered anchors": (remembered_fastbat.problem(), HessianFreeKKT(), 3.05),
    "Free-AT, a replay": (free.problem(), ZeroIG(), 1.01),
    "TRADES": (trades.problem(), ZeroIG(), (1 + 20 + 6) / 3 + 0.01),
    "MART": (mart.problem(), ZeroIG(), (20 + 6) / 3 + 0.01),
    "N-FGSM": (nfgsm.problem(), ZeroIG(), 1.68),
    "ZeroGrad": (zerograd.problem(), ZeroIG(), 1.68),
    "MultiGrad": (zerograd.problem(variant="multigrad"), ZeroIG(), 3.01),
    "SSAT": (ssat.problem(), ZeroIG(), (2 + 2 + 3) / 3 + 0.01),  # if every prediction at a checkpoint is right
    # with gradients through a pass that the attack shares, whose backward pass to the input is one of its own
    "FGSM-PGI": (fgsm_pgi.problem(), ZeroIG(), (2 + 3 + 2) / 3 + 0.01),
    "TDAT": (tdat.problem(), ZeroIG(), (2 + 3 + 2) / 3 + 0.01),
    "LIET": (liet.problem(), ZeroIG(), (2 + 3 + 2) / 3 + 0.01),
    # a reference (1), the attack (2), two passes that train (6)
    "NuAT": (nuat.problem(), ZeroIG(), (1 + 2 + 6) / 3 + 0.01),
    "GAT": (gat.problem(), ZeroIG(), (1 + 2 + 6) / 3 + 0.01),
    "QUB on Fast-AT": (qub.problem(), ZeroIG(), (2 + 6) / 3 + 0.01),
    "AWP on PGD-10": (awp.problem(), ZeroIG(), (20 + 3 + 3) / 3 + 0.01),
    "AWP on TRADES": (awp.problem(of="trades"), ZeroIG(), (1 + 20 + 6 + 6) / 3 + 0.01),
    "YOPO-5-3": (yopo.problem(), yopo.solver(), 5 + 0.05),
    "Sub-AT, sampling": (subat.problem(), subat.solver(), 1.68),
    "FGSM-SDI": (fgsm_sdi.problem(), ZeroIG(), (2 + 2 + 3) / 3 + 0.06),  # and a pass of the generator
    "FGSM-SDI, where the generator learns": (fgsm_sdi.problem(), fgsm_sdi.solver(), (2 + 2 + 3 + 4) / 3 + 0.2),
}


@pytest.mark.parametrize("method", fast(COSTS, ["Fast-AT", "ATAS", "GradAlign", "Fast-BAT", "Free-AT, a replay"]))
def test_a_step_costs_its_passes(method):
    """Floating-point operations of a PreActResNet-18 step, as a multiple of a standard training step."""
    torch.manual_seed(0)
    model = build_model("preact_resnet18", (3, 32, 32), 10)
    x = torch.rand(2, 3, 32, 32)
    # Labels that the network predicts, so that SSAT makes every pass that it may have to make.
    batch = ba.Batch(x, model.eval()(x).argmax(1), torch.arange(2))
    model.train()
    base = flops(standard.problem(), ZeroIG(), model, batch)
    problem, solver, limit = COSTS[method]
    if method == "LIET":
        solver.backward(problem, model, batch)  # which sees the grey images too, as every 20th step does
    multiple = flops(problem, solver, model, batch) / base
    print(f"{method}: {multiple:.3f} × a standard step")
    assert multiple <= limit
