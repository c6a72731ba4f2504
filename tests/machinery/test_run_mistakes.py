"""Mistakes in what is asked of the run command: one line, and nothing is written."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import ROOT, SHORT, complaint, npz

from bilevel_at.evaluate.radius import number_from_text as number

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--epsilon", "-0.1"], "epsilon is -0.1; it must be a finite number, at least 0"),
        (["--epsilon", "8"], "epsilon is 8, and inputs are in [0, 1], where every image would be any other; for 8-bit"),
        (["--epsilon", "8/0"], "--epsilon: '8/0' is not a number"),
        (["--epsilon", "big"], "--epsilon: 'big' is not a number (0.03 and 8/255 are)"),
        (["--epsilon", "nan"], "epsilon is nan"),
        (["--step", "0"], "step is 0; it must be a positive finite number"),
        (["--step", "-3"], "step is -3"),
        (["--epsilom", "0.1"], "--epsilom is not a flag here; did you mean --epsilon?"),
        (["--anchor", "middle"], "invalid choice 'middle' for argument '--anchor'"),
        (["0.1"], "'0.1' is one argument too many"),
        (["--solver", "newton"], "invalid choice 'newton' for argument '--solver'. Expected one of ("),
        (["--damping", "-1"], "damping is -1; it must be a finite number, at least 0"),
        (["--model", "resnet"], "model 'resnet' is not known; choose from small_cnn, one_layer_cnn, small_resnet"),
        (["--model", "file"], "defines no model(shape, classes)"),
        (["--data", "mnist"], "data 'mnist' is not known; choose from digits"),
        (
            ["--data", "cifar10", "--no-download"],
            "put cifar10.npz (arrays x_train, y_train, x_test, y_test) into data/",
        ),
        (["--data", "none.npz"], "data file none.npz does not exist"),
        (["--attacks", "clean", "pgd-0-1"], "attack 'pgd-0-1' is not known"),
        (["--device", "tpu9"], "--device tpu9 cannot be used here"),
        (["--epochs", "0"], "--epochs is 0; it must be a whole number, at least 1"),
        (["--accumulate", "0"], "--accumulate is 0; it must be a whole number, at least 1"),
        (["--ema", "1"], "--ema is 1; the decay of an average is at least 0 and below 1"),
        (["--epsilon-warmup", "31"], "--epsilon-warmup is 31, and there are 30 epochs"),
        (["--extra-fraction", "1.5"], "--extra-fraction is 1.5; it must be from 0 to 1"),
        (["--extra", "none.npz"], "--extra none.npz does not exist; it is an .npz with x_train and y_train"),
        (["--held-out", "5000"], "--held-out is 5000, and there are 1437 training images"),
        (["--held-out", "1436"], "--held-out is 1436, and there are 1437 training images"),
        (["--label-smoothing", "2"], "label_smoothing is 2.0; it must be from 0 to 1"),
        (["--recipe", "best"], "invalid choice 'best' for argument '--recipe'"),
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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"x_train": np.zeros((60, 9, 9, 3), np.uint8)},
            "has images of (3, 9, 9); the training images are (3, 8, 8)",
        ),
        ({"y_train": np.arange(60) % 7}, "has the label 6; the training set has labels 0 … 2"),
        ({"y_train": None}, "has no array y_train; it needs x_train, y_train or image, label"),
        ({"y_train": np.arange(60) / 2}, "y_train is float64 of shape (60,); labels are a vector of integers"),
        (
            {"x_train": np.zeros((60, 8, 8, 3), np.float32)},
            "has torch.float32 images; the training images are torch.ui",
        ),
        ({"y_train": np.array([{}] * 60, dtype=object)}, "holds pickled objects, which are never loaded"),
    ],
)
def test_extra_images_that_do_not_fit(changes, says):
    extra = npz("extra.npz", x_test=None, y_test=None, **changes)
    assert says in complaint("problems/fastat.py", "--data", npz(), "--extra", extra)


def test_extra_images_are_called_as_their_file_calls_them():
    np.savez("extra.npz", image=np.zeros((9, 8, 8, 3), np.uint8), label=np.full(9, -1))
    says = complaint("problems/fastat.py", "--data", npz(), "--extra", "extra.npz")
    assert says.startswith("--extra extra.npz: label has the label -1; labels are 0")


def test_a_radius_that_cannot_grow():
    Path("fixed.py").write_text("from bilevel_at.problems import fastat\ndef problem(): return fastat.problem(0.1)\n")
    says = complaint("fixed.py", "--epsilon-warmup", "2")
    assert says == "--epsilon-warmup is for problems with a number epsilon; fixed.py has none"
    Path("halved.py").write_text(
        "from bilevel_at.problems import fgsm\ndef problem(epsilon: float = 1): return fgsm.problem(min(epsilon, 1))\n"
    )
    says = complaint("halved.py", "--epsilon-warmup", "2")
    assert says.startswith("--epsilon-warmup gives problem(...) a ba.Schedule as epsilon: halved.py, line 2: ")
    assert "TypeError: '<' not supported" in says


def test_a_threat_that_changes():
    """It was printed, and the best epoch chosen, at a radius that was not the one attacked in the end."""
    Path("growing.py").write_text(
        "import bilevel_at as ba\nfrom bilevel_at.problems import fgsm\ndef problem(): return "
        "fgsm.problem(ba.Schedule(lambda epoch, epochs: 0.02 * (epoch + 1)))\n"
    )
    says = complaint("growing.py")
    assert says.startswith("growing.py: the LinfBall of training changes with time") and "threat=..." in says


def test_files_that_are_no_npz():
    Path("text.npz").write_text("hello")
    says = "text.npz is not an .npz file, which is a zip archive of arrays"
    assert complaint("problems/fastat.py", "--data", "text.npz") == says
    np.save("one.npy", np.zeros(3))
    Path("one.npy").rename("one.npz")
    assert "single array" in complaint("problems/fastat.py", "--data", "one.npz")
    Path("cut.npz").write_bytes(Path(npz()).read_bytes()[:500])
    assert "cut.npz" in complaint("problems/fastat.py", "--data", "cut.npz")


def status(monkeypatch, capsys, *args):
    """(exit status, output, errors) of ``python -m bilevel_at.run ...``, in this process."""
    monkeypatch.setattr(sys, "argv", ["run", *args])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("bilevel_at.run", run_name="__main__")
    return end.value.code or 0, *capsys.readouterr()


@pytest.mark.filterwarnings("ignore:'bilevel_at.run' found in sys.modules")
def test_exit_statuses(monkeypatch, capsys):
    code, _, errors = status(monkeypatch, capsys, "problems/fastbat.py", "--epsilon", "-1")
    assert code == 2
    assert errors == "bilevel_at.run: epsilon is -1; it must be a finite number, at least 0 (such as 8/255)\n"
    code, shown, _ = status(monkeypatch, capsys, "problems/fastbat.py", "--help")
    assert code == 0 and "--epsilon NUMBER" in shown and "--curvature" not in shown
    code, shown, _ = status(monkeypatch, capsys, "problems/fastbat.py", "--solver", "full-kkt", "--help")
    assert code == 0 and "--curvature {lower,attack}" in shown
    code, _, errors = status(monkeypatch, capsys, "--epsilon", "1")
    assert code == 2 and "the problem file comes first" in errors


@pytest.mark.slow
def test_exit_status_of_a_process():
    command = [sys.executable, "-m", "bilevel_at.run", "problems/fastbat.py", "--epsilon", "-1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_numbers():
    assert number("8/255") == 8 / 255 and number("1e-3") == 1e-3
    for text in ("8/", "/2", "1/2/3", "0x8", "1/0"):
        with pytest.raises(ValueError, match="is not a number"):
            number(text)


def test_a_coupled_loss_has_no_parts():
    """It is refused before the run directory is made."""
    for flags in (["problems/nuat.py"], ["problems/awp.py", "--of", "nuat"]):
        line = complaint(*flags, "--data", npz(), "--accumulate", "2", "--out", "out")
        assert line.startswith("--accumulate is 2, but the upper loss is one number for all of a batch")


@pytest.mark.parametrize(
    "flags",
    [
        "--cross-at merged",
        "--solver value-function",
        "--solver gauss-newton-kkt",
        "--solver lazy --inner full-kkt --p 0.01",
    ],
)
def test_solvers_that_are_no_graph_are_refused_before_anything_is_written(flags):
    """The coin of the last one almost always falls on the solver that is a graph."""
    assert "leave out --compile" in complaint(ROOT / "problems" / "fastbat.py", *flags.split(), "--compile", *SHORT)


def test_steps_that_would_each_be_compiled_anew_are_refused():
    says = complaint(ROOT / "problems" / "fastat.py", "--epsilon-warmup", "2", "--compile")
    assert says.startswith("--compile compiles a step for each number that it reads, and ")
    assert says.endswith("leave out --compile, or what changes by the step (--epsilon-warmup)")


def test_a_network_that_does_not_take_half_precision_is_named_before_anything_is_written():
    Path("single.py").write_text(
        "import torch, bilevel_at as ba\n"
        "from bilevel_at.problems.fgsm import problem\n"
        "class Single(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        if torch.is_autocast_enabled('cpu'):\n"
        "            raise ValueError('not in half precision')\n"
        "        return super().forward(x.flatten(1))\n"
        "def model(shape, classes):\n"
        "    return Single(64, classes)\n"
    )
    says = complaint("single.py", "--precision", "bfloat16")
    assert says == "single.py, line 6: its problem cannot be solved: ValueError: not in half precision"
