"""The command: every problem file with every solver, a user's own file, bad input, interruption and resumption."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands.plan import understand
from bilevel_at.evaluate.radius import number_from_text as number
from bilevel_at.models import MODELS
from bilevel_at.runs.checkpoints import FORMAT
from bilevel_at.runs.problem_file import packaged_problems
from bilevel_at.solvers import HessianFreeKKT, ZeroIG
from bilevel_at.train import Trainer

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--epochs", "1", "--examples", "100", "--attacks", "clean", "pgd-2-1", "--select", "pgd-2-1"]
PROBLEMS = sorted(path.stem for path, _ in packaged_problems())
SOLVERS = ["zero-ig", "hessian-free-kkt", "full-kkt"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test in a directory of its own, outside the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args):
    assert run_module.run([str(a) for a in args]) == 0


def complaint(*args):
    """What the command says of a mistake; it must be one line, and nothing may have been written."""
    before = sorted(Path().rglob("*"))
    with pytest.raises((ba.InputError, ba.BilevelError)) as error:
        run_module.run([str(a) for a in args])
    assert [p for p in sorted(Path().rglob("*")) if p.name != "__pycache__" and p.suffix != ".pyc"] == before
    line = str(error.value)
    assert "\n" not in line and len(line) < 400
    return line


# --- what should work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_problem_runs_with_every_solver(problem, solver):
    run(f"problems/{problem}.py", "--solver", solver, *SHORT, "--out", "out")
    config = json.loads(Path("out/config.json").read_text())
    assert config["solver"]["name"].lower() == solver.replace("-", "")
    results = json.loads(Path("out/results.json").read_text())
    for which in ("best", "last"):
        assert set(results[which]) == {"clean", "pgd-2-1"}
        assert results[which]["pgd-2-1"]["n"] == 360 and results[which]["pgd-2-1"]["epsilon"] == pytest.approx(0.2)
        assert 0 <= results[which]["pgd-2-1"]["accuracy"] <= results[which]["clean"]["accuracy"] <= 1


PUBLISHED = {
    # model, epochs, batch, peak rate, schedule, decays after epochs, weight decay
    "standard": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "fgsm": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "fastat": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "minmax": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "gradalign": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "fastbat": ("preact_resnet18", 20, 128, 0.2, "linear", (), 5e-4),
    "free": ("preact_resnet18", 10, 128, 0.2, "linear", (), 5e-4),
    "atta": ("resnet18", 30, 128, 0.1, "multistep", (24, 28), 5e-4),
    "atas": ("resnet18", 30, 128, 0.1, "multistep", (24, 28), 5e-4),
    "sgd_bca": ("resnet18", 30, 128, 0.1, "multistep", (24, 28), 5e-4),
    "asgd_bca": ("resnet18", 30, 128, 0.1, "multistep", (24, 28), 5e-4),
    "remembered_fastbat": ("resnet18", 30, 128, 0.1, "multistep", (24, 28), 5e-4),
    "beta": ("resnet18", 110, 128, 0.1, "multistep", (100,), 5e-4),
    "smooth_beta": ("resnet18", 110, 128, 0.1, "multistep", (100,), 5e-4),
    "trades": ("wide_resnet34_10", 76, 128, 0.1, "multistep", (74,), 2e-4),
    "mart": ("resnet18", 120, 128, 0.01, "multistep", (74, 89, 99), 3.5e-3),
}
EVAL_MODE_ATTACKS = {"atta", "atas", "sgd_bca", "asgd_bca", "remembered_fastbat", "trades", "mart"}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_published_recipe_is_the_default_on_cifar10(problem):
    plan = understand([f"problems/{problem}.py", "--data", "cifar10"])
    r = plan.options.recipe()
    stated = (r.model, r.epochs, r.batch_size, r.lr, r.schedule, r.milestones, r.weight_decay)
    assert stated == PUBLISHED[problem]
    assert (r.momentum, r.augment, r.accumulate, r.ema) == (0.9, "crop-flip", 1, 0)
    lower = plan.problem.lower
    assert lower.constraint.epsilon == pytest.approx(8 / 255)
    if problem != "standard":  # which attacks nothing
        assert lower.mode == ("eval" if problem in EVAL_MODE_ATTACKS else "train")
    for data in ("cifar100", "tiny_imagenet", "svhn", "imagenet", "fashion_mnist"):
        other = understand([f"problems/{problem}.py", "--data", data])
        assert other.options.augment == {"svhn": "none", "imagenet": "resized-crop-flip", "fashion_mnist": "none"}.get(
            data, "crop-flip"
        )
        assert other.problem.lower.constraint.epsilon == pytest.approx(2 / 255 if data == "imagenet" else 8 / 255)


def test_published_settings_beyond_cifar10():
    def plan(*args):
        return understand([str(a) for a in args])

    for epsilon, step in (("8/255", 5000 / 255), ("16/255", 2000 / 255)):
        fastbat = plan("problems/fastbat.py", "--data", "cifar100", "--epsilon", epsilon)
        assert fastbat.problem.lower.step_size() == pytest.approx(step)
        assert fastbat.solver.ig_weight == pytest.approx(0.1 / step)
    fastbat = plan("problems/fastbat.py", "--data", "imagenet")
    assert fastbat.problem.lower.step_size() == pytest.approx(3000 / 255)
    assert fastbat.solver.ig_weight == pytest.approx(0.1 * 255 / 3000)
    assert fastbat.options.model == "imagenet_resnet50"
    for method in ("atta", "atas"):
        imagenet = plan(f"problems/{method}.py", "--data", "imagenet")
        r = imagenet.options.recipe()
        assert (r.model, r.epochs, r.batch_size, r.milestones) == ("imagenet_resnet18", 90, 128, (50, 75))
        assert r.weight_decay == 1e-4 and imagenet.problem.lower.anchor.size == 32
    assert imagenet.problem.lower.step.c == pytest.approx(0.1 * 128)
    assert imagenet.problem.lower.step.gamma / imagenet.problem.lower.step.c == pytest.approx(16 / 255)
    free = plan("problems/free.py", "--data", "imagenet")
    assert (free.options.epochs, free.problem.replays) == (45, 4)


@pytest.mark.parametrize("problem", PROBLEMS)
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
    largest = 0 if problem == "standard" else 8 / 255
    assert 0 <= lines[0]["perturbation"] <= largest + 1e-7
    if problem != "free":  # whose first pass is at 0, and is the one that is looked at here
        assert (lines[0]["perturbation"] > 0) == (problem != "standard")
    assert ba.load("out")(torch.rand(2, 3, 16, 16)).shape == (2, 5)


def test_a_run_leaves_what_the_contract_says():
    run("problems/fastbat.py", *SHORT[2:], "--epochs", 2, "--epsilon", "8/255", "--out", "out")
    names = {
        "config.json",
        "metrics.jsonl",
        "history.npz",
        "results.json",
        "evaluation",
        "last.pt",
        "best.pt",
        "figures",
    }
    assert {p.name for p in Path("out").iterdir()} == names
    assert {p.name for p in Path("out/figures").iterdir()} == {"curves.png", "examples.png"}
    metrics = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == [1, 2]
    assert metrics[0]["implicit_ratio"] > 0 and metrics[1]["lr"] < metrics[0]["lr"] + 0.1
    config = json.loads(Path("out/config.json").read_text())
    assert config["problem"]["epsilon"] == pytest.approx(8 / 255) and config["problem"]["step"] == 20
    assert config["solver"]["ig_weight"] == pytest.approx(0.1 / 20)
    assert config["versions"]["torch"] == torch.__version__

    for which in ("best", "last"):
        model = ba.load("out", which)
        assert not model.training
        assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_what_is_shown_and_which_epoch_is_best(capsys):
    run("problems/fastbat.py", "--epochs", 4, "--examples", 200, "--select", "pgd-2-1", "--out", "out")
    shown = capsys.readouterr().out
    assert "180 training, 20 held-out, 360 test images" in " ".join(shown.split())
    for epoch in range(1, 5):
        assert re.search(rf"epoch {epoch}/4  loss [\d.]+  held-out clean [\d.]+%  pgd-2-1 [\d.]+%", shown)
    metrics = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    best = max(metrics, key=lambda m: (m["robust"], m["clean"], m["epoch"]))["epoch"]
    assert torch.load("out/best.pt", weights_only=True)["epochs"] == best
    results = json.loads(Path("out/results.json").read_text())
    for which, epoch in (("best", best), ("last", 4)):
        cells = [f"{100 * results[which][name]['accuracy']:.1f}%" for name in ("clean", "fgsm", "pgd-50-10")]
        assert re.search(rf"{which} \({epoch}\)\W+{cells[0]}\W+{cells[1]}\W+{cells[2]}", shown)
        # the table is that of the checkpoint, evaluated anew
        from bilevel_at.data import load_data
        from bilevel_at.evaluate import attack_from_name, evaluate

        test = load_data("digits")[1]
        again = evaluate(ba.load("out", which), test, [attack_from_name("pgd-50-10", 0.2)])
        assert again["pgd-50-10"].accuracy == results[which]["pgd-50-10"]["accuracy"]


@pytest.mark.parametrize("scheme", ["gradient-step", "uniform", "corner", "sign-step"])
def test_linearisation_schemes_are_flags(scheme):
    lower = understand(["problems/fastbat.py", "--anchor", scheme, "--epsilon", "0.1"]).problem.lower
    kinds = {"gradient-step": ("Steps", "taylor", None), "sign-step": ("Steps", "sign", 0.05)}
    kind, direction, step = kinds.get(scheme, (scheme.capitalize(), None, None))
    assert type(lower.anchor).__name__ == kind
    if direction:
        assert lower.anchor.direction.name == direction and lower.anchor.step == step


def test_bfloat16_autocast():
    run("problems/fastbat.py", *SHORT[2:], "--epochs", 2, "--precision", "bfloat16", "--out", "half")
    run("problems/fastbat.py", *SHORT[2:], "--epochs", 2, "--out", "single")
    lines = [json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1]) for out in ("half", "single")]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=0.02) and lines[0]["loss"] != lines[1]["loss"]
    assert all(t.dtype == torch.float32 for t in weights("half").values())


def test_averaged_weights_are_what_is_kept():
    run("problems/fastat.py", *SHORT[2:], "--epochs", 2, "--ema", 0.9, "--accumulate", 2, "--out", "out")
    state = torch.load("out/last.pt", weights_only=True)
    loaded = ba.load("out", "last").state_dict()
    assert same(loaded, state["average"]) and not same(loaded, state["model"])
    run("problems/fastat.py", *SHORT[2:], "--epochs", 1, "--ema", 0.9, "--accumulate", 2, "--out", "one")
    assert "was started with ema = 0.9, and is resumed with 0.0" in complaint(
        "problems/fastat.py", *SHORT[2:], "--epochs", 1, "--accumulate", 2, "--out", "one", "--resume"
    )


def test_catastrophic_overfitting_is_said_and_the_weights_before_it_are_kept(monkeypatch, capsys):
    """Held-out robust accuracy is made to collapse in epoch 3; the rest of the run is real."""
    robust, seen = iter([0.3, 0.4, 0.05, 0.02]), []

    def measured(self):
        for line, value in zip(epochs(self), robust, strict=True):
            seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
            yield dataclasses.replace(line, robust=value, train=0.1 * line.epoch)

    epochs = Trainer.epochs
    monkeypatch.setattr(Trainer, "epochs", measured)
    run("problems/fgsm.py", "--epochs", 4, *SHORT[2:], "--out", "out")
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        shown.count("catastrophic overfitting in epoch 3: held-out pgd-2-1 accuracy is 5.0% after 40.0% in epoch 2")
        == 2
    )
    assert "went from 20.0% to 30.0%; last_good.pt keeps epoch 2" in shown
    assert same(ba.load("out", "last_good").state_dict(), seen[1]) and same(
        ba.load("out", "last").state_dict(), seen[3]
    )
    results = json.loads(Path("out/results.json").read_text())
    assert set(results) == {"best", "last", "last_good"} and re.search(r"last good \(2\)", shown)


def test_solver_flags_reach_the_solver():
    flags = ["--ig-factor", "0.2", "--damping", "3", "--curvature", "lower", "--method", "cg"]
    plan = understand(["problems/fastbat.py", "--solver", "full-kkt", "--step", "10", *flags])
    assert plan.solver.ig_weight == pytest.approx(0.2 / 10)
    assert (plan.solver.damping, plan.solver.curvature, plan.solver.method) == (3.0, "lower", "cg")
    assert understand(["problems/fastbat.py"]).options.recipe().batch_size == 64
    cifar = understand(["problems/fastbat.py", "--data", "cifar10"])
    assert cifar.options.recipe().lr == 0.2 and cifar.options.augment == "crop-flip"
    assert cifar.problem.lower.step_size() == pytest.approx(5000 / 255)


README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


def readme_block(containing):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    return next(b for b in blocks if containing in b)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_readme_s_custom_problem_runs(solver):
    Path("my_problem.py").write_text(readme_block("def problem("))
    run("my_problem.py", "--epsilon", "0.5", "--solver", solver, *SHORT, "--out", "out")
    config = json.loads(Path("out/config.json").read_text())
    assert config["problem"]["epsilon"] == 0.5


def test_the_readme_s_example_runs():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    loader = [(torch.rand(5, 3, 2, 2), torch.randint(0, 4, (5,))) for _ in range(3)]
    before = model[1].weight.detach().clone()
    exec(readme_block("solver.backward"), {"model": model, "loader": loader})
    assert not torch.equal(model[1].weight, before)


def test_the_readme_s_check_runs():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    names = {"model": model, "x": torch.rand(5, 3, 2, 2), "y": torch.randint(0, 4, (5,))}
    exec(readme_block("def problem("), names)
    exec(readme_block("import hypergradcheck"), names)
    with pytest.raises(AssertionError, match="ZeroIG disagrees with finite differences"):
        exec(readme_block("import hypergradcheck").replace("FullKKT", "ZeroIG"), names)


def test_the_methods_page_s_python_runs():
    page = (ROOT / "docs/methods.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {}
    for block in blocks:
        exec(block, names)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    batch = ba.Batch(torch.rand(5, 3, 2, 2), torch.randint(0, 4, (5,)), torch.arange(5))
    step = names["solver"].backward(names["problem"], model, batch)
    assert step.loss.isfinite()
    lower = ba.Linearized(ba.minus(names["Drift"]()), ba.LinfBall(0.1), ba.Steps(ba.Gaussian(), "sign"), "taylor", 0.1)
    for solver in (ZeroIG(), HessianFreeKKT()):  # the reference prepared, and the one that θ moves
        assert solver.backward(ba.BilevelProblem(ba.UpperProblem(), lower), model, batch).loss.isfinite()


def test_the_methods_page_names_every_method_and_model():
    page = (ROOT / "docs/methods.md").read_text()
    assert all(f"`{problem}.py`" in page for problem in PROBLEMS)
    for name in MODELS:
        family = re.sub(r"(18|34|50|16_8|28_10|34_10)$", "", name)
        assert re.search(rf"`{family}", page), name


def npz(path="data.npz", **changes):
    g = np.random.default_rng(0)
    arrays = {
        "x_train": g.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(60) % 3,
        "x_test": g.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(12) % 3,
    }
    arrays.update(changes)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_the_user_s_own_images(augment):
    run("problems/atas.py", "--data", npz(), "--epochs", 2, "--augment", augment, "--attacks", "clean", "--out", "out")
    config = json.loads(Path("out/config.json").read_text())
    assert config["shape"] == [3, 8, 8] and config["classes"] == 3
    x = np.zeros((60, 12, 12), dtype=np.float32)  # grey, floating point, NHW
    run(
        "problems/fastat.py",
        "--data",
        npz(x_train=x, x_test=x[:12]),
        "--epochs",
        1,
        "--attacks",
        "clean",
        "--out",
        "grey",
    )


def test_fewer_test_examples():
    run("problems/fastat.py", *SHORT, "--test-examples", 50, "--out", "out")
    assert json.loads(Path("out/results.json").read_text())["last"]["clean"]["n"] == 50


def test_results_of_other_images_are_not_reused():
    """The same training images, other test labels: --resume attacks again, and keeps what belongs to these images."""
    run("problems/fastat.py", "--data", npz(), "--epochs", 1, "--attacks", "clean", "--out", "out")
    before = json.loads(Path("out/results.json").read_text())["last"]["clean"]
    run("problems/fastat.py", "--data", npz(), "--epochs", 1, "--attacks", "clean", "--out", "out", "--resume")
    assert json.loads(Path("out/results.json").read_text())["last"]["clean"] == before  # seconds and all
    npz(y_test=(np.arange(12) + 1) % 3)
    run("problems/fastat.py", "--data", "data.npz", "--epochs", 1, "--attacks", "clean", "--out", "out", "--resume")
    after = json.loads(Path("out/results.json").read_text())["last"]["clean"]
    assert after["data"] != before["data"] and after["accuracy"] != before["accuracy"]
    Path("out/results.json").write_text('{"last": {"clean": {"accuracy": 7}}}')  # from elsewhere, or damaged
    run("problems/fastat.py", "--data", "data.npz", "--epochs", 1, "--attacks", "clean", "--out", "out", "--resume")
    again = json.loads(Path("out/results.json").read_text())["last"]["clean"]
    assert {**again, "seconds": 0} == {**after, "seconds": 0}


def test_named_data_is_found_as_an_npz():
    Path("mine").mkdir()
    npz("mine/cifar10.npz")
    run("problems/fastat.py", "--data", "cifar10", "--data-dir", "mine", *SHORT[:2], *SHORT[4:], "--out", "out")


# --- randomness, interruption -----------------------------------------------------------------------------


def weights(path):
    return torch.load(Path(path) / "last.pt", weights_only=True)["model"]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_the_seed_decides_everything():
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("problems/fastbat.py", *SHORT, "--seed", seed, "--out", out)
    assert same(weights("a"), weights("b")) and not same(weights("a"), weights("c"))


@pytest.mark.parametrize("problem", ["fastbat", "atas", "asgd_bca", "free"])
def test_a_resumed_run_is_the_unbroken_one(problem, monkeypatch):
    args = [f"problems/{problem}.py", "--epochs", "3", *SHORT[2:], "--ema", "0.9"]
    run(*args, "--out", "whole")
    epoch, seen = Trainer.train_epoch, []

    def interrupted(self, number):
        seen.append(number)
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupted)
        with pytest.raises(
            KeyboardInterrupt, match="2 of 3 epochs are in broken; the same command with --resume goes on"
        ):
            run_module.run([*args, "--out", "broken"])
        with pytest.raises(KeyboardInterrupt, match="2 of 3 epochs are in broken; the same command goes on"):
            run_module.run([*args, "--out", "broken", "--resume"])
    assert not Path("broken/results.json").exists()
    run(*args, "--out", "broken", "--resume")
    assert same(weights("whole"), weights("broken"))
    whole, broken = (dict(np.load(f"{out}/history.npz", allow_pickle=False)) for out in ("whole", "broken"))
    assert whole.keys() == broken.keys() and len(whole["gradient_norm"]) == 3 and len(whole["filters"]) == 4
    assert all(np.array_equal(whole[name], broken[name], equal_nan=True) for name in whole)
    lines = [
        [json.loads(line) for line in Path(p, "metrics.jsonl").read_text().splitlines()] for p in ("whole", "broken")
    ]
    for whole, broken in zip(*lines, strict=True):
        untimed = {"seconds": 0, "train_seconds": 0}
        assert {**whole, **untimed} == {**broken, **untimed}
    run(*args, "--out", "broken", "--resume")  # nothing is left to train: it evaluates, and does not train again
    assert same(weights("whole"), weights("broken"))


def test_runs_do_not_overwrite_each_other():
    run("problems/fastat.py", *SHORT)
    run("problems/fastat.py", *SHORT)
    assert {p.name for p in Path("runs").iterdir()} == {"fastat-digits-seed0", "fastat-digits-seed0-2"}
    assert "already holds a run" in complaint("problems/fastat.py", *SHORT, "--out", "runs/fastat-digits-seed0")
    line = complaint("problems/fastat.py", *SHORT, "--out", "runs/fastat-digits-seed0", "--resume", "--epsilon", "0.1")
    assert "was started with epsilon = 0.2, and is resumed with 0.1" in line
    assert "no run to resume in nowhere" in complaint("problems/fastat.py", *SHORT, "--out", "nowhere", "--resume")


def test_ctrl_c_in_a_real_process(interruptible):
    command = [sys.executable, "-m", "bilevel_at.run", "problems/fastbat.py", "--out", "out", "--epochs", "500"]
    process = interruptible(command)
    deadline = time.monotonic() + 120
    while not Path("out/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"\d+ of 500 epochs are in out; the same command with --resume goes on", said.splitlines()[-1])
    assert "Traceback" not in said


# --- what should not work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--epsilon", "-0.1"], "epsilon is -0.1; it must be a finite number, at least 0"),
        (["--epsilon", "8/0"], "--epsilon: '8/0' is not a number"),
        (["--epsilon", "big"], "--epsilon: 'big' is not a number (0.03 and 8/255 are)"),
        (["--epsilon", "nan"], "epsilon is nan"),
        (["--step", "0"], "step is 0; it must be a positive finite number"),
        (["--step", "-3"], "step is -3"),
        (["--epsilom", "0.1"], "--epsilom is not a flag here; did you mean --epsilon?"),
        (["--anchor", "middle"], "invalid choice 'middle' for argument '--anchor'"),
        (["0.1"], "'0.1' is one argument too many"),
        (["--solver", "newton"], "invalid choice 'newton' for argument '--solver'. Expected one of ("),
        (["--damping", "-1"], "damping is -1.0; it must be a finite number, at least 0"),
        (["--model", "resnet"], "model 'resnet' is not known; choose from small_cnn, one_layer_cnn, preact_resnet18"),
        (["--model", "file"], "defines no model(shape, classes)"),
        (["--data", "mnist"], "data 'mnist' is not known; choose from digits"),
        (
            ["--data", "cifar10", "--no-download"],
            "put cifar10.npz (arrays x_train, y_train, x_test, y_test) into data/",
        ),
        (["--data", "none.npz"], "data file none.npz does not exist"),
        (["--attacks", "clean", "pgd-0-1"], "attack 'pgd-0-1' is not known"),
        (["--device", "tpu9"], "--device tpu9 cannot be used here"),
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--accumulate", "0"], "--accumulate is 0; it must be at least 1"),
        (["--ema", "1"], "--ema is 1; the decay of an average is at least 0 and below 1"),
        (["--dropout", "0.3"], "model small_cnn has no dropout; the wide residual networks do"),
        (["--augment", "resized-crop-flip"], "augment 'resized-crop-flip' is not for images in memory"),
        (["--schedule", "multistep"], "--schedule multistep needs --milestones"),
        (["--milestones", "5", "3"], "--milestones are (5, 3); they must be epochs in order, from 1 on"),
        (["--lr", "0"], "--lr is 0; it must be a positive number"),
        (["--test-examples", "0"], "--test-examples is 0; it must be at least 1"),
        (["--examples", "3"], "--examples is 3; it must be at least 20"),
        (["--seed", "x"], "--seed: invalid literal for int"),
        (["--seed", "10000000000000"], "--seed is 10000000000000; it must be at least 0 and below 2**32"),
        (["--attacks"], "--attacks names no attack"),
        (["--device", "meta"], "--device meta cannot be used here"),
        (["--out", "/proc/nothing/here"], "/proc/nothing/here cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(args, says):
    assert says in complaint("problems/fastbat.py", *args)


def bad_npz():
    images = np.zeros((60, 8, 8, 3), dtype=np.uint8)
    yield "missing", {"y_test": None}, "has no array y_test; it needs x_train, y_train, x_test, y_test"
    yield "pickle", {"y_train": np.array([{}] * 60, dtype=object)}, "holds pickled objects, which are never loaded"
    yield "labels", {"y_test": np.arange(12)}, "y_test has the label 11, which y_train (0 … 2) does not have"
    yield "negative", {"y_train": np.arange(60) % 3 - 1}, "y_train has the label -1"
    yield "floats", {"y_train": np.arange(60) / 2}, "y_train is float64 of shape (60,); labels are a vector of integers"
    yield "lengths", {"y_train": np.arange(50) % 3}, "x_train has 60 images and y_train 50 labels"
    yield (
        "range",
        {"x_train": images.astype(np.float32) + 7},
        "x_train has values from 7 to 7; floating point images lie in [0, 1]",
    )
    yield "nan", {"x_train": images * np.float32("nan")}, "x_train has NaN values"
    yield "int", {"x_train": images.astype(np.int32)}, "x_train is int32; images are uint8, or floating point in [0, 1]"
    yield "shape", {"x_train": images.reshape(60, -1)}, "x_train has shape (60, 192); images are NHWC or NCHW"
    yield (
        "sizes",
        {"x_test": np.zeros((12, 9, 9, 3), dtype=np.uint8)},
        "training images are (3, 8, 8) and test images (3, 9, 9)",
    )
    yield "one class", {"y_train": np.zeros(60, int), "y_test": np.zeros(12, int)}, "has one class only"


@pytest.mark.parametrize(("changes", "says"), [pytest.param(c, s, id=i) for i, c, s in bad_npz()])
def test_bad_data_files(changes, says):
    assert says in complaint("problems/fastat.py", "--data", npz(**changes))


def test_files_that_are_no_npz():
    Path("text.npz").write_text("hello")
    assert "text.npz" in complaint("problems/fastat.py", "--data", "text.npz")
    np.save("one.npy", np.zeros(3))
    Path("one.npy").rename("one.npz")
    assert "single array" in complaint("problems/fastat.py", "--data", "one.npz")
    Path("cut.npz").write_bytes(Path(npz()).read_bytes()[:500])
    assert "cut.npz" in complaint("problems/fastat.py", "--data", "cut.npz")


FAST = "from bilevel_at.problems.fastat import problem\n\n"
TUPLES = (
    FAST
    + """
import torch
class Two(torch.nn.Module):
    def forward(self, x):
        return x, x
def model(shape, classes):
    return Two()
"""
)
OWN = """
import torch
from bilevel_at.problems.fastat import problem
def model(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, {width}))
"""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1", "defines no problem(...); it must, and return a BilevelProblem"),
        ("import nothing_of_the_kind", "own.py, line 1: ModuleNotFoundError"),
        ("x = 1\ndef problem(:", "own.py: SyntaxError"),
        ("def problem(): return 3", "problem(...) returns int; it must return a BilevelProblem"),
        ("def problem(epsilon: float = 0.1): raise ValueError('no')", "problem(...) failed: ValueError: no"),
        ("def problem(loss: object): pass", "problem(loss) needs a type that a flag can have, or a default"),
        ("def problem(epochs: int = 3): pass", "--epochs would mean two things"),
        (
            "import bilevel_at as ba\ndef problem(): return ba.BilevelProblem(ba.UpperProblem(), ba.LowerProblem())",
            "the lower problem has no constraint",
        ),
        (
            "from bilevel_at.problems.fastat import problem\ndef recipe(): return 3",
            "recipe() returns 3; it must map data set names",
        ),
        (
            FAST + "from bilevel_at.solvers import ZeroIG\nsolver = ZeroIG()",
            "own.py: solver is ZeroIG(); it must be a function",
        ),
        (FAST + "def recipe(): return {}['x']", "own.py, line 3: recipe() failed: KeyError: 'x'"),
        (
            FAST + "def model(shape, classes): raise RuntimeError('a\\nb')",
            "own.py, line 3: model(...) failed: RuntimeError: a b",
        ),
        ("raise SystemExit(0)", "own.py, line 1: SystemExit: 0"),
        ("def problem(steps: int = 0): return 1 / steps", "own.py, line 1: problem(...) failed: ZeroDivisionError"),
        (
            "import bilevel_at as ba\ndef attack(model, batch, delta):\n    return model(batch.x + delta)[:, 99]\n"
            "def problem(): return ba.BilevelProblem(ba.UpperProblem(), ba.Linearized(attack, ba.LinfBall(0.1)))",
            "own.py, line 3: its problem cannot be solved: IndexError",
        ),
        (TUPLES, "own.py's model gives tuple for 2 images"),
        (OWN.format(width=7), "own.py's model gives (2, 7) for 2 images; 10 classes need (2, 10)"),
        (OWN.replace("64", "63").format(width=10), "own.py: the model does not take (1, 8, 8) images: RuntimeError"),
    ],
)
def test_bad_problem_files(source, says):
    Path("own.py").write_text(source)
    assert says in complaint("own.py")


def test_a_model_of_the_user_s_own_and_loading_it():
    Path("own.py").write_text(OWN.format(width=10))
    run("own.py", *SHORT, "--out", "out")
    with pytest.raises(ba.InputError, match=r"'own.py'; pass one as load\(..., model=...\)"):
        ba.load("out")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    assert ba.load("out", model=model)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ba.InputError, match="does not fit"):
        ba.load("out", model=torch.nn.Linear(64, 10))


def test_loading_refuses_what_is_not_a_checkpoint():
    run("problems/fastat.py", *SHORT, "--out", "out")

    class Evil:
        def __reduce__(self):
            return (Path("evil").touch, ())

    torch.save({"model": Evil()}, "out/best.pt")
    with pytest.raises(ba.InputError, match="not a checkpoint of tensors"):
        ba.load("out")
    assert not Path("evil").exists()
    with pytest.raises(ba.InputError, match="which is 'first'"):
        ba.load("out", "first")
    with pytest.raises(ba.InputError, match="nowhere has no config.json"):
        ba.load("nowhere")


def test_the_file_s_solver_is_what_its_own_flags_say():
    source = FAST + (
        "from bilevel_at.solvers import FullKKT, ZeroIG\n"
        "def solver(epsilon: float, how: str = 'zero'):\n"
        "    return FullKKT(damping=epsilon) if how == 'full' else ZeroIG()\n"
    )
    Path("own.py").write_text(source)
    assert type(understand(["own.py"]).solver).__name__ == "ZeroIG"
    plan = understand(["own.py", "--how", "full", "--epsilon", "0.25", "--method", "cg"])
    assert (type(plan.solver).__name__, plan.solver.damping, plan.solver.method) == ("FullKKT", 0.25, "cg")
    assert type(understand(["own.py", "--solver", "hessian-free-kkt"]).solver).__name__ == "HessianFreeKKT"


def test_solvers_of_the_user_s_own_with_fields_that_are_no_flags():
    source = FAST + (
        "from dataclasses import dataclass\nfrom collections.abc import Callable\n"
        "from bilevel_at.solvers import HessianFreeKKT\n"
        "@dataclass\nclass Mine(HessianFreeKKT):\n    watch: Callable | None = None\n"
        "def solver():\n    return Mine(watch=print)\n"
    )
    Path("own.py").write_text(source)
    plan = understand(["own.py", "--ig-weight", "0.5"])
    assert plan.solver.ig_weight == 0.5 and plan.solver.watch is print
    for _ in range(2):
        run("own.py", *SHORT, "--out", "out", *(["--resume"] if Path("out").exists() else []))


def test_help_does_not_wait_for_required_flags(capsys):
    Path("own.py").write_text(
        "from bilevel_at.problems import fastat\ndef problem(radius: float):\n    return fastat.problem(radius)\n"
    )
    with pytest.raises(SystemExit) as done:
        run_module.run(["own.py", "--help"])
    assert done.value.code == 0 and "--radius NUMBER" in capsys.readouterr().out
    assert "--radius" in complaint("own.py")


def test_data_that_changed_does_not_resume():
    args = ["problems/fastat.py", "--data", "data.npz", "--epochs", "1", "--attacks", "clean", "--out", "out"]
    npz()
    run(*args)
    run(*args, "--resume")
    npz(x_train=np.zeros((60, 8, 8, 3), dtype=np.uint8))
    assert "was started with other training images" in complaint(*args, "--resume")


def test_batches_of_one():
    from bilevel_at.data import Images, Loader

    images = Images(torch.zeros(7, 1, 2, 2), torch.zeros(7).long(), 2)
    for size, lengths in ((1, [1] * 7), (3, [3, 4]), (2, [2, 2, 3]), (4, [4, 3]), (9, [7])):
        loader = Loader(images, size)
        batches = [len(batch) for batch in loader.epoch(0)]
        assert batches == lengths and len(loader) == len(lengths), size


def test_names_that_are_also_ours():
    Path("own.py").write_text(
        "import bilevel_at as ba\nfrom bilevel_at.problems import fastat\n"
        "def problem(kind: str = 'a', function: float = 0.1, solver_tol: int = 3):\n"
        "    return fastat.problem(function)\n"
    )
    assert understand(["own.py", "--kind", "b", "--function", "1/5"]).problem.lower.constraint.epsilon == 0.2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"\xff\xfe", "is not JSON"),
        ("config.json", b"[]", "is not one of bilevel_at.run"),
        ("last.pt", b"", "is not a checkpoint of tensors"),
        ("last.pt", b"hello", "is not a checkpoint of tensors"),
        ("last.pt", {}, "last.pt has checkpoint format 1"),
        ("last.pt", {"format": FORMAT}, "last.pt is not a checkpoint of this run (KeyError"),
        ("last.pt", torch.zeros(3), "last.pt is not a checkpoint of bilevel_at.run"),
        ("metrics.jsonl", b"", "metrics.jsonl does not have the 1 epochs that last.pt has"),
        ("metrics.jsonl", b"what\n", "is not a file of JSON lines"),
    ],
)
def test_resuming_from_damaged_files(name, content, says):
    args = ["problems/fastat.py", *SHORT[2:], "--epochs", "1", "--out", "out"]
    run(*args)
    if isinstance(content, bytes):
        Path("out", name).write_bytes(content)
    else:
        torch.save(content, Path("out", name))
    assert says in complaint(*args, "--resume")


def test_a_line_that_was_being_written_is_forgotten():
    args = ["problems/fastat.py", *SHORT, "--out", "out"]
    run(*args)
    whole = Path("out/metrics.jsonl").read_text()
    Path("out/metrics.jsonl").write_text(whole + '{"epoch": 2, "lo')
    run(*args, "--resume")
    assert Path("out/metrics.jsonl").read_text() == whole


def test_a_changed_problem_file_does_not_resume():
    Path("own.py").write_text(FAST)
    run("own.py", *SHORT, "--out", "out")
    Path("own.py").write_text(FAST + "# changed")
    assert "was started with another own.py" in complaint("own.py", *SHORT, "--out", "out", "--resume")


def test_a_last_batch_of_one_joins_the_one_before():
    """Batch normalisation cannot train on a single example."""
    source = FAST + (
        "from torch import nn\n"
        "def model(shape, classes):\n"
        "    first = nn.Linear(64, 8)\n"
        "    return nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))\n"
    )
    Path("own.py").write_text(source)
    run("own.py", "--examples", "101", "--batch-size", "6", *SHORT[:2], *SHORT[4:], "--out", "out")  # 91 = 15 · 6 + 1


def test_a_solver_that_must_refuse_says_so_before_anything_is_written():
    line = complaint("problems/beta.py", "--solver", "hessian-free-kkt", "--damping", "0")
    assert "no proximal term" in line


def test_exit_statuses_of_the_process():
    def status(*args):
        done = subprocess.run([sys.executable, "-m", "bilevel_at.run", *args], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, _, said = status("problems/fastbat.py", "--epsilon", "-1")
    assert code == 2 and "Traceback" not in said
    assert (
        said.splitlines()[-1] == "bilevel_at.run: epsilon is -1; it must be a finite number, at least 0 (such as 8/255)"
    )
    code, shown, _ = status("problems/fastbat.py", "--help")
    assert code == 0 and "--epsilon NUMBER" in shown and "--curvature" not in shown
    code, shown, _ = status("problems/fastbat.py", "--solver", "full-kkt", "--help")
    assert code == 0 and "--curvature {lower,attack}" in shown
    code, _, said = status("--epsilon", "1")
    assert code == 2 and "the problem file comes first" in said


def test_list(capsys):
    with pytest.raises(SystemExit) as done:
        run_module.run(["--list"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for name in (*PROBLEMS, "standard", "preact_resnet18", "digits", "cifar10", "FILE.npz"):
        assert re.search(rf"^  {name} +\S", shown, re.M), name


def test_numbers():
    assert number("8/255") == 8 / 255 and number("1e-3") == 1e-3
    for text in ("8/", "/2", "1/2/3", "0x8", "1/0"):
        with pytest.raises(ValueError, match="is not a number"):
            number(text)
