"""Every problem file on the command line: every solver, the published settings, the network of CIFAR-10."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import fast
from running import PROBLEMS, SHORT, SOLVERS, complaint, npz, run

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands.plan import understand
from bilevel_at.commands.settings import settings_of
from bilevel_at.solvers import FullKKT, HessianFreeKKT

pytestmark = pytest.mark.usefixtures("elsewhere")


PAIRS = [(problem, solver) for problem in PROBLEMS for solver in SOLVERS]
WITHOUT_DERIVATIVE = {"ssat"}  # whose δ* is no minimiser
QUICK = [("fastbat", "full-kkt"), ("ssat", "full-kkt"), ("free", "zero-ig"), ("smooth_beta", "hessian-free-kkt")]


@pytest.mark.parametrize(("problem", "solver"), fast(PAIRS, QUICK))
def test_every_problem_runs_with_every_solver(problem, solver):
    if problem in WITHOUT_DERIVATIVE and solver != "zero-ig":
        line = complaint(f"problems/{problem}.py", "--solver", solver, *SHORT, "--out", "out")
        assert "without a derivative in θ" in line
        return
    run(f"problems/{problem}.py", "--solver", solver, *SHORT, "--out", "out")
    config = json.loads(Path("out/config.json").read_text())
    assert config["solver"]["name"].lower() == solver.replace("-", "")
    results = json.loads(Path("out/results.json").read_text())
    for which in ("best", "last"):
        assert set(results[which]) == {"clean", "pgd-2-1"}
        assert results[which]["pgd-2-1"]["n"] == 60 and results[which]["pgd-2-1"]["epsilon"] == pytest.approx(0.2)
        assert 0 <= results[which]["pgd-2-1"]["accuracy"] <= results[which]["clean"]["accuracy"] <= 1


@pytest.mark.parametrize("solver", ["projection-adjoint", "neumann", "value-function", "gauss-newton-kkt"])
def test_fastbat_runs_with_the_other_solvers(solver):
    """The file's own weight of the implicit term, 0.1·λ, is theirs too."""
    flags = {"neumann": ("--terms", "3", "--alpha", "0.2"), "value-function": ("--s", "0.05")}.get(solver, ())
    if solver == "gauss-newton-kkt":
        flags = ("--damping", "auto", "--model", "one_layer_cnn")
    run("problems/fastbat.py", "--solver", solver, *SHORT, "--step", "0.5", "--mode", "eval", *flags, "--out", "out")
    settings = json.loads(Path("out/config.json").read_text())["solver"]
    assert settings["name"].lower() == solver.replace("-", "") and settings["ig_weight"] == pytest.approx(0.2)
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if flag != "--model":
            assert str(settings[flag[2:]]) == value


@pytest.mark.parametrize(
    ("flags", "inner"),
    [
        ((), {"inner": "HessianFreeKKT", "inner_damping": 0.0, "inner_cross_at": "anchor"}),
        (("--inner", "full-kkt", "--damping", "2"), {"inner": "FullKKT", "inner_damping": 2.0}),
    ],
)
def test_lazy_wraps_the_solver_of_the_file_or_of_a_flag(flags, inner):
    run("problems/fastbat.py", "--solver", "lazy", "--p", "0.5", *SHORT, "--step", "0.5", *flags, "--out", "out")
    settings = json.loads(Path("out/config.json").read_text())["solver"]
    assert {"name": "Lazy", "p": 0.5, "inner_ig_weight": pytest.approx(0.2)}.items() <= settings.items()
    assert inner.items() <= settings.items()
    run(
        "problems/fastbat.py",
        "--solver",
        "lazy",
        "--p",
        "0.5",
        *SHORT,
        "--step",
        "0.5",
        *flags,
        "--out",
        "out",
        "--resume",
    )


def test_a_file_whose_solver_is_lazy_is_not_wrapped_twice():
    Path("own.py").write_text(
        "from bilevel_at.problems import fastbat\nfrom bilevel_at.solvers import HessianFreeKKT, Lazy\n"
        "problem = fastbat.problem\ndef solver(): return Lazy(HessianFreeKKT(), 0.5)\n"
    )
    for flags in ((), ("--solver", "lazy")):
        solver = understand(["own.py", *flags]).solver
        assert solver.p == 0.5 and type(solver.inner) is HessianFreeKKT
    assert type(understand(["own.py", "--solver", "lazy", "--inner", "full-kkt"]).solver.inner) is FullKKT


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--solver", "lazy", "--inner", "zero-ig"), "ZeroIG has no implicit term, so there is nothing to leave out"),
        (("--inner", "full-kkt"), "--inner is the solver that --solver lazy wraps"),
        (("--solver", "lazy", "--p", "0"), "p is 0; it must be a positive finite number"),
        (("--solver", "lazy", "--p", "3/2"), "p is 1.5; it must be above 0 and at most 1"),
        (("--solver", "neumann", "--terms", "0"), "terms is 0; it must be a whole number, at least 1"),
        (("--solver", "value-function", "--s", "0"), "s is 0; it must be a positive"),
        (("--solver", "gauss-newton-kkt", "--damping", "-1"), "damping is -1; it must be a finite number, at least 0"),
        (("--p", "0.5"), "--p is not a flag here"),
    ],
)
def test_mistakes_about_solvers(flags, line):
    assert line in complaint("problems/fastbat.py", *flags, *SHORT)


PUBLISHED = {
    # model, epochs, batch, peak rate, schedule, decays after epochs, weight decay
    "standard": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "fgsm": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "fastat": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "minmax": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "gradalign": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "fastbat": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "free": ("preact_resnet18", 10, 128, 0.04, "linear", (), 5e-4),
    "atta": ("resnet18", 30, 128, 0.1, "multistep", (24, 28), 5e-4),
    "atas": ("resnet18", 30, 128, 0.1, "multistep", (24, 28), 5e-4),
    "sgd_bca": ("resnet18", 30, 128, 0.1, "multistep", (24, 28), 5e-4),
    "asgd_bca": ("resnet18", 30, 128, 0.1, "multistep", (24, 28), 5e-4),
    "remembered_fastbat": ("resnet18", 30, 128, 0.1, "multistep", (24, 28), 5e-4),
    "beta": ("resnet18", 110, 128, 0.1, "multistep", (100,), 5e-4),
    "smooth_beta": ("resnet18", 110, 128, 0.1, "multistep", (100,), 5e-4),
    "trades": ("wide_resnet34_10", 76, 128, 0.1, "multistep", (74,), 2e-4),
    "mart": ("resnet18", 120, 128, 0.01, "multistep", (74, 89, 99), 3.5e-3),
    "nfgsm": ("preact_resnet18", 30, 128, 0.2, "linear", (), 5e-4),
    "zerograd": ("preact_resnet18", 30, 128, 0.2, "linear", (), 5e-4),
    "ssat": ("preact_resnet18", 200, 128, 0.01, "multistep", (60, 120, 160), 5e-4),
    "fgsm_pgi": ("resnet18", 110, 128, 0.1, "multistep", (100, 105), 5e-4),
    "tdat": ("resnet18", 110, 128, 0.1, "multistep", (100, 105), 5e-4),
    "liet": ("resnet18", 100, 128, 0.1, "one-cycle-by-epoch", (), 5e-4),
    "nuat": ("resnet18", 100, 64, 0.1, "linear", (), 5e-4),
    "gat": ("resnet18", 100, 64, 0.1, "multistep", (70, 85), 5e-4),
    "qub": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "awp": ("preact_resnet18", 200, 128, 0.1, "multistep", (100, 150), 5e-4),
    "yopo": ("preact_resnet18", 36, 256, 0.04, "multistep", (30, 34), 5e-4),
    "subat": ("preact_resnet18", 105, 128, 0.1, "constant", (), 0.0),
    "fgsm_sdi": ("preact_resnet18", 110, 128, 0.1, "multistep", (100, 105), 5e-4),
    "composed": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
}


AVERAGING = {"liet": (0.95, 0.9995)}  # momentum, and the decay of the weights' average
EVAL_MODE_ATTACKS = {
    "atta",
    "atas",
    "sgd_bca",
    "asgd_bca",
    "remembered_fastbat",
    "trades",
    "mart",
    "ssat",
    "nuat",
    "gat",
    "qub",
    "composed",
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_published_recipe_is_the_default_on_cifar10(problem):
    plan = understand([f"problems/{problem}.py", "--data", "cifar10"])
    r = plan.options.training()
    stated = (r.model, r.epochs, r.batch_size, r.lr, r.schedule, r.milestones, r.weight_decay)
    assert stated == PUBLISHED[problem]
    momentum, ema = AVERAGING.get(problem, (0.9, 0))
    assert (r.momentum, r.augment, r.accumulate, r.ema) == (momentum, "crop-flip", 1, ema)
    lower = plan.problem.lower
    assert plan.problem.threat.epsilon == pytest.approx(8 / 255)
    if problem not in ("standard", "free"):  # which have no attack passes
        assert lower.mode == ("eval" if problem in EVAL_MODE_ATTACKS else "train")
    for data in ("cifar100", "tiny_imagenet", "svhn", "imagenet", "fashion_mnist"):
        other = understand([f"problems/{problem}.py", "--data", data])
        assert other.options.augment == {"svhn": "none", "imagenet": "resized-crop-flip", "fashion_mnist": "none"}.get(
            data, "crop-flip"
        )
        assert other.stated.threat.epsilon == pytest.approx(2 / 255 if data == "imagenet" else 8 / 255)


def test_published_settings_beyond_cifar10():
    def plan(*args):
        return understand([str(a) for a in args])

    for epsilon, step in (("8/255", 5000 / 255), ("16/255", 2000 / 255)):
        fastbat = plan("problems/fastbat.py", "--data", "cifar100", "--epsilon", epsilon)
        assert fastbat.problem.lower.step.value == pytest.approx(step)
        assert fastbat.solver.ig_weight == pytest.approx(0.1 / step)
    fastbat = plan("problems/fastbat.py", "--data", "imagenet")
    assert fastbat.problem.lower.step.value == pytest.approx(3000 / 255)
    assert fastbat.solver.ig_weight == pytest.approx(0.1 * 255 / 3000)
    assert fastbat.options.model == "imagenet_resnet50"
    for method in ("atta", "atas"):
        imagenet = plan(f"problems/{method}.py", "--data", "imagenet")
        r = imagenet.options.training()
        assert (r.model, r.epochs, r.batch_size, r.milestones) == ("imagenet_resnet18", 90, 128, (50, 75))
        assert r.weight_decay == 1e-4 and imagenet.problem.lower.anchor.size == 32
    assert imagenet.problem.lower.step.c == pytest.approx(0.1 * 128)
    assert imagenet.problem.lower.step.gamma / imagenet.problem.lower.step.c == pytest.approx(16 / 255)
    free = plan("problems/free.py", "--data", "imagenet")
    assert (free.options.epochs, free.options.replays) == (45, 4)


@pytest.mark.parametrize("problem", fast(PROBLEMS, ["atas", "fastbat"]))
def test_every_problem_trains_the_cifar_network(problem):
    """The acceptance command, on 20 made-up images of a quarter of CIFAR's size."""
    Path("data").mkdir()
    g = np.random.default_rng(0)
    npz(
        "data/cifar10.npz",
        x_train=g.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8),
        y_train=np.arange(60) % 5,
        x_test=g.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8),
        y_test=np.arange(12) % 5,
    )
    flags = ["--model", "preact_resnet18", "--examples", 20, "--batch-size", 9, "--epochs", 1, "--test-examples", 4]
    if "steps" in inspect.signature(importlib.import_module(f"bilevel_at.problems.{problem}").problem).parameters:
        flags += ["--steps", 2]  # the number of steps is a number
    if problem == "free":
        flags += ["--replays", 2]
    attacks = ["--attacks", "clean", "pgd-1-1", "--select", "pgd-1-1"]
    run(f"problems/{problem}.py", "--data", "cifar10", *flags, *attacks, "--out", "out")
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 1 and np.isfinite(lines[0]["loss"])
    largest = {"standard": 0, "nfgsm": 24 / 255}.get(problem, 8 / 255)
    assert 0 <= lines[0]["perturbation"] <= largest + 1e-7
    if problem != "free":  # whose first pass is at 0, and is the one that is looked at here
        assert (lines[0]["perturbation"] > 0) == (problem != "standard")
    assert ba.load("out")(torch.rand(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize("scheme", ["gradient-step", "uniform", "corner", "sign-step"])
def test_linearisation_schemes_are_flags(scheme):
    lower = understand(["problems/fastbat.py", "--anchor", scheme, "--epsilon", "0.1"]).problem.lower
    kinds = {"gradient-step": ("Steps", "taylor", lower.step.value), "sign-step": ("Steps", "sign", 0.05)}
    kind, direction, step = kinds.get(scheme, (scheme.capitalize(), None, None))
    assert type(lower.anchor).__name__ == kind
    if direction:
        assert lower.anchor.direction.name == direction and lower.anchor.step.value == step


def test_solver_flags_reach_the_solver():
    flags = ["--ig-factor", "0.2", "--damping", "3", "--curvature", "lower", "--method", "cg"]
    plan = understand(["problems/fastbat.py", "--solver", "full-kkt", "--step", "10", *flags])
    assert plan.solver.ig_weight == pytest.approx(0.2 / 10)
    assert (plan.solver.damping, plan.solver.curvature, plan.solver.method) == (3.0, "lower", "cg")
    assert understand(["problems/fastbat.py"]).options.training().batch_size == 64
    cifar = understand(["problems/fastbat.py", "--data", "cifar10"])
    assert cifar.options.training().lr == 0.2 and cifar.options.augment == "crop-flip"
    assert cifar.problem.lower.step.value == pytest.approx(5000 / 255)


def test_a_solver_that_must_refuse_says_so_before_anything_is_written():
    line = complaint("problems/beta.py", "--solver", "hessian-free-kkt", "--damping", "0")
    assert "no proximal term" in line


def test_list(capsys):
    with pytest.raises(SystemExit) as done:
        run_module.run(["--list"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for name in (*PROBLEMS, "standard", "preact_resnet18", "digits", "cifar10", "FILE.npz"):
        assert re.search(rf"^  {name} +\S", shown, re.M), name


def test_the_radius_of_a_run_grows_and_its_threat_does_not():
    plan = understand(["problems/fastat.py", "--epsilon-warmup", "10"])
    constraint, anchor = plan.problem.lower.constraint, plan.problem.lower.anchor
    for step, share in ((0, 1 / 20), (9, 1 / 2), (19, 1), (59, 1)):
        plan.problem.set_step(step, 60)  # 30 epochs of two updates
        assert constraint.radius == pytest.approx(0.2 * share) and anchor.radius.value == pytest.approx(0.2 * share)
        assert plan.problem.lower.step.size(None, None) == pytest.approx(0.25 * share)
        assert plan.problem.threat.radius == plan.threat.radius == 0.2
    assert plan.feasible_set is None
    svhn = understand(["problems/nfgsm.py" if "nfgsm" in PROBLEMS else "problems/fgsm.py", "--data", "svhn"])
    assert svhn.options.epsilon_warmup == 5


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_modern_recipe(problem):
    plan = understand([f"problems/{problem}.py", "--data", "cifar10", "--recipe", "modern"])
    r = plan.options.training()
    stated = (r.model, r.epochs * r.replays, r.batch_size, r.lr, r.schedule, r.momentum, r.peak_momentum)
    assert stated[0] == "resnet18" and 96 <= stated[1] <= 100
    assert (stated[2], r.held_out, r.select) == (128, 1000, "pgd-10-1")
    if problem == "subat":  # an average would cross its return to the first weights, and a decay leave its subspace
        assert (*stated[3:], r.weight_decay, r.ema) == (0.1, "constant", 0.9, None, 0, 0)
    else:
        rate = 0.1 / 5 if problem == "yopo" else 0.1  # YOPO's step is a sum of five gradients
        assert stated[3:] == (rate, "one-cycle-by-epoch", 0.95, 0.85)
        assert (r.weight_decay, r.ema) == (5e-4, 0.9995)
    assert plan.problem_arguments["label_smoothing"] == 0.4
    changed = understand([f"problems/{problem}.py", "--recipe=modern", "--ema", "0.5", "--label-smoothing", "0"])
    assert changed.options.ema == 0.5 and changed.problem_arguments["label_smoothing"] == 0
    assert changed.options.batch_size == understand([f"problems/{problem}.py"]).options.batch_size


def test_the_modern_recipe_of_a_problem_without_smoothing():
    Path("own.py").write_text(
        "from bilevel_at.problems import fgsm\ndef problem(epsilon: float = 0.1): return fgsm.problem(epsilon)\n"
    )
    run("own.py", "--recipe", "modern", *SHORT, "--out", "out")


@pytest.mark.parametrize(
    ("problem", "settings"),
    [
        ("fgsm_sdi", {"name": "SDI", "every": 20}),
        (
            "subat",
            {"name": "Subspace", "inner": "ZeroIG", "components": 80, "sampling": 0.4, "every": 5, "gain": 2.0},
        ),
    ],
)
def test_the_solver_settings_are_without_what_it_has_learnt(problem, settings):
    assert settings_of(understand([f"problems/{problem}.py"]).solver) == settings


@pytest.mark.parametrize("data", ["digits", "cifar10", "svhn", "imagenet"])
def test_rates_and_decays_that_a_method_needs_on_every_data_set(data):
    """AWP's decay of V is SGD's; YOPO adds up five gradients; weight decay would take Sub-AT out of its subspace."""
    awp, yopo, fgsm, subat = (
        understand([f"problems/{m}.py", "--data", data]) for m in ("awp", "yopo", "fgsm", "subat")
    )
    assert awp.problem_arguments["moved_decay"] == awp.options.weight_decay
    assert yopo.options.lr == pytest.approx(fgsm.options.lr / 5)
    assert (subat.options.weight_decay, subat.options.schedule, subat.options.lr) == (0.0, "constant", 0.1)
