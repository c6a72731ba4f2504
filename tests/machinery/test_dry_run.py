"""``run FILE --dry-run``: says what would be trained and what it costs; trains, writes and downloads nothing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from marks import fast
from running import PROBLEMS, complaint, npz, run, weights

import bilevel_at as ba
from bilevel_at.commands import flags
from bilevel_at.commands.main import command
from bilevel_at.data import Loader, load_data, stand_in
from bilevel_at.diagnose import estimate
from bilevel_at.models import build_model
from bilevel_at.problems import fastbat
from bilevel_at.solvers import HessianFreeKKT

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def told(capsys, without_network):
    """The rows of a dry run by their first word; it must have written nothing."""

    def ask(*args):
        before = sorted(Path().rglob("*"))
        capsys.readouterr()
        run(*args, "--dry-run")
        out, err = capsys.readouterr()
        assert sorted(Path().rglob("*")) == before and err == ""
        return {line[:14].strip(): line[14:].strip() for line in out.splitlines()}

    return ask


def test_the_composition_is_told_in_words(told):
    rows = told("problems/fastbat.py", "--epsilon", "0.1", "--out", "here", "--ig-weight", "0.5")
    assert rows["training"].startswith("fastbat on digits: 1,293 images of 1×8×8 in 10 classes; small_cnn of 151,306")
    assert rows["anchor"].startswith("Steps(start=Uniform(radius=0.1), direction=taylor, step=20)   (z after count")
    assert rows["direction"] == "taylor" and rows["step"].startswith("20 ") and rows["mode"] == "train"
    assert rows["attack_loss"].startswith("minus(cross_entropy)") and rows["criterion"].startswith("cross_entropy")
    assert rows["solver"].startswith("HessianFreeKKT(ig_weight=0.5)") and rows["threat"] == "LinfBall(epsilon=0.1)"
    assert rows["exact"] == "HessianFreeKKT: the Hessian of g is λI; HessianFreeKKT has ig_weight = 0.5"
    assert rows["remembers"] == "nothing" and rows["an epoch"].startswith("21 steps, ")


def test_the_figures_are_those_of_estimate(told):
    rows = told("problems/fastbat.py", "--batch-size", "16", "--tflops", "2e-4", "--epochs", "3")
    train, _ = load_data("digits")
    few = train.split(0.1)[0][slice(0, 16)]
    batch = next(Loader(few, 16).epoch(0))
    model = build_model("small_cnn", (1, 8, 8), 10, few)
    problem = fastbat.problem(epsilon=0.2, step=20.0)
    cost = estimate(problem, HessianFreeKKT(), model, batch, optimizer=lambda p: torch.optim.SGD(p, 0.1, 0.9))
    assert rows["a step"].startswith(
        f"{cost.multiple:.2f} × plain training in operations: {cost.flops / 1e6:.3g} MFLOP"
    )
    assert rows["memory"].startswith(f"{cost.peak_bytes / 2**20:.1f} MiB at the peak of a step")
    assert f"of these {cost.memory_bytes / 2**20:.1f} MiB stay" in rows["memory"]
    seconds = 81 * cost.flops / 2e8  # 1,293 images, the last of which joins the batch before it
    assert rows["an epoch"].startswith("81 steps") and f"; {seconds:.3g} s at 0.0002 TFLOP/s" in rows["an epoch"]
    assert f"all 3 epochs {3 * seconds / 60:.3g} min" in rows["an epoch"]


@pytest.mark.parametrize("name", fast(PROBLEMS, ["awp", "free", "ssat", "subat"]))
def test_every_problem_can_be_asked(name, told):
    rows = told(f"problems/{name}.py", "--examples", "40", "--batch-size", "8")
    assert re.match(r"\d+\.\d\d × plain", rows["a step"]) and "MiB at the peak" in rows["memory"]
    assert rows["solver"] and rows["exact"] and rows["threat"] and rows["lower"]
    # In the last epoch it goes on from what the ones before have left.
    assert ("of the first epoch, as in the last Sub-AT trains in the subspace" in rows["a step"]) == (name == "subat")


def test_a_set_that_is_not_there_has_its_usual_size(told):
    rows = told("problems/atas.py", "--data", "cifar10", "--model", "small_resnet")
    assert "45,000 images of 3×32×32 in 10 classes (cifar10 is not in data/" in rows["training"]
    canvases, known = 45_000 * 3 * 40 * 40 * 4, 45_000  # a flag for each
    numbers = 45_000 * 4 + 45_000
    remembered = re.fullmatch(
        r"lower.anchor\S* (.+) MiB, lower.step\S* (.+) MiB, with 45,000 examples", rows["remembers"]
    )
    assert remembered[1] == f"{(canvases + known) / 2**20:.1f}" and remembered[2] == f"{numbers / 2**20:.1f}"
    assert rows["an epoch"].startswith("352 steps")  # 351 of 128, and one of 72


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "svhn", "tiny_imagenet", "imagenet"])
def test_what_stands_in_takes_the_memory_of_an_image(name):
    images = stand_in(name)
    assert len(images.x) == len(images) == len(images.y) and images.y.max() + 1 == images.classes
    assert images.x.untyped_storage().nbytes() == images[slice(5, None)].x.untyped_storage().nbytes()
    assert images.x.untyped_storage().nbytes() == images.x[0].numel()


def test_data_and_networks_of_one_s_own(told):
    npz()
    Path("own.py").write_text(
        "from torch import nn\nfrom bilevel_at.problems.trades import problem, solver\n"
        "def model(shape, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))\n"
    )
    rows = told("own.py", "--data", "data.npz")
    assert rows["training"] == "own on data.npz: 54 images of 3×8×8 in 3 classes; file of 579 parameters"
    # Products of one layer: plain 2; TRADES' reference 1, 10 steps of 2, two passes that train of 2, and ∇_δ f.
    assert rows["lower"].startswith("Linearized") and rows["a step"].startswith(f"{(1 + 20 + 4 + 1) / 2:.2f} ×")


def test_what_is_inexact_is_told_in_a_line(told):
    Path("far.py").write_text(
        "import bilevel_at as ba\nfrom bilevel_at.solvers import FullKKT\n"
        "class Upper(ba.UpperProblem):\n"
        "    def loss_at(self, model, batch, solution, generator=None):\n"
        "        if len(batch) != 4: raise ba.InputError('only four')\n"
        "        return super().loss_at(model, batch, solution, generator)\n"
        "def problem(epsilon: float = 0.2):\n"
        "    return ba.BilevelProblem(Upper(), ba.Proximal(ba.minus(ba.cross_entropy), ba.LinfBall(epsilon), 50.0))\n"
        "def solver():\n    return FullKKT()\n"
    )
    rows = told("far.py")
    assert rows["a step"] == "its cost cannot be told: only four" and "memory" not in rows
    assert rows["exact"].startswith("FullKKT: g is curved")


def test_without_torch_s_estimator_the_peak_is_not_told(told, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed._tools.mem_tracker", None)
    memory = told("problems/fastat.py")["memory"]
    assert "MiB stay from step to step" in memory and "the peak cannot be told: this torch has no" in memory


def test_a_batch_of_one(told):
    rows = told("problems/fastbat.py", "--examples", "20", "--batch-size", "1", "--cross-at", "merged")
    assert "for a batch of 1," in rows["a step"] and "cross_at=merged" in rows["solver"]


def test_settings_that_change_no_count_are_told(told):
    rows = told("problems/fastat.py", "--precision", "bfloat16", "--ema", "0.9", "--device", "cuda", "--replays", "2")
    assert "in float32 (less in bfloat16, for which it is not told)" in rows["memory"]
    assert "the averaged network besides, 0.6 MiB" in rows["memory"] and rows["an epoch"].startswith("42 steps")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--dry-run", "--tflops", "0"], "--tflops is 0; it must be a positive finite number"),
        (["--dry-run", "--tflops", "-3"], "--tflops is -3; it must be a positive finite number"),
        (["--dry-run", "--tflops", "fast"], "--tflops: no type matching"),
        (["--tflops", "40"], "--tflops is for --dry-run"),
        (["--dry-run", "--data", "mnist"], "data 'mnist' is not known"),
        (["--dry-run", "--data", "none.npz"], "data file none.npz does not exist"),
        (["--dry-run", "--held-out", "1436"], "--held-out is 1436, and there are 1437 training images"),
        (["--dry-run", "--model", "resnet"], "model 'resnet' is not known"),
        (["--dry-run", "--attacks", "pgd-0-1"], "attack 'pgd-0-1' is not known"),
        (["--dry-run", "--data", "cifar10", "--held-out", "49999"], "--held-out is 49999, and there are 50000"),
    ],
)
def test_mistakes_are_one_line(args, says, without_network):
    assert says in complaint("problems/fastbat.py", *args)


def test_the_exit_status_of_a_mistake_is_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bilevel-at", "run", "fastat", "--dry-run", "--tflops", "0"])
    assert flags.main(command, "bilevel-at") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_is_there_is_left_alone(told, run_here):
    before = json.loads(Path("run/config.json").read_text()), weights("run")
    rows = told("problems/fastat.py", "--out", "run", "--epochs", "5")
    assert rows["solver"].startswith("ZeroIG") and not {"dry_run", "tflops"} & set(before[0]["options"])
    assert before[0] == json.loads(Path("run/config.json").read_text())
    assert all(torch.equal(a, b) for a, b in zip(before[1].values(), weights("run").values(), strict=True))
    assert isinstance(ba.load("run"), torch.nn.Module)


@pytest.mark.parametrize("flags", [("--solver", "value-function"), ("--cross-at", "merged")])
def test_differences_are_for_networks_without_kinks(told, flags):
    """Units that change their side between two points are an error of ValueFunction's that does not fall with s."""
    assert "this one has ReLU: units that change" in told("problems/fastbat.py", *flags)["note"]
    assert "note" not in told("problems/fastbat.py", *flags, "--activation", "softplus")
    assert "note" not in told("problems/fastbat.py")


def test_a_run_says_so_too(capsys):
    few = ["--epochs", "1", "--examples", "40", "--test-examples", "10", "--attacks", "clean", "--select", "clean"]
    run("problems/fastbat.py", "--cross-at", "merged", *few)
    assert "takes differences, which are for smooth networks" in " ".join(capsys.readouterr().out.split())
