"""The seed decides everything; an interrupted run goes on to the same end."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import fast
from running import PROBLEMS, SHORT, complaint, npz, run, same, unchecked, weights

from bilevel_at import run as run_module
from bilevel_at.runs.checkpoints import FORMAT
from bilevel_at.train import Trainer

pytestmark = pytest.mark.usefixtures("elsewhere")


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
    unchecked("out")
    Path("out/results.json").write_text('{"last": {"clean": {"accuracy": 7}}}')  # from elsewhere, or damaged
    run("problems/fastat.py", "--data", "data.npz", "--epochs", 1, "--attacks", "clean", "--out", "out", "--resume")
    again = json.loads(Path("out/results.json").read_text())["last"]["clean"]
    assert {**again, "seconds": 0} == {**after, "seconds": 0}


def test_the_seed_decides_everything():
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("problems/fastbat.py", *SHORT, "--seed", seed, "--out", out)
    assert same(weights("a"), weights("b")) and not same(weights("a"), weights("c"))


@pytest.mark.parametrize("problem", fast(PROBLEMS, ["fastbat", "atas"]))
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


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(interruptible):
    command = [sys.executable, "-m", "bilevel_at.run", "problems/fastbat.py", "--out", "out", "--epochs", "500"]
    process = interruptible(command)
    deadline = time.monotonic() + 120
    while not Path("out/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    more = r"( and \d+ of the \d+ updates of the next)?"
    assert re.search(
        rf"\d+ of 500 epochs{more} are in out; the same command with --resume goes on", said.splitlines()[-1]
    )
    assert "Traceback" not in said


def test_data_that_changed_does_not_resume():
    args = ["problems/fastat.py", "--data", "data.npz", "--epochs", "1", "--attacks", "clean", "--out", "out"]
    npz()
    run(*args)
    run(*args, "--resume")
    npz(x_train=np.zeros((60, 8, 8, 3), dtype=np.uint8))
    assert "was started with other training images" in complaint(*args, "--resume")


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
    unchecked("out")
    if isinstance(content, bytes):
        Path("out", name).write_bytes(content)
    else:
        torch.save(content, Path("out", name))
    assert says in complaint(*args, "--resume")


def test_a_line_that_was_being_written_is_forgotten():
    args = ["problems/fastat.py", *SHORT, "--out", "out"]
    run(*args)
    unchecked("out")
    whole = Path("out/metrics.jsonl").read_text()
    Path("out/metrics.jsonl").write_text(whole + '{"epoch": 2, "lo')
    run(*args, "--resume")
    assert Path("out/metrics.jsonl").read_text() == whole


def test_a_run_with_every_part_of_the_recipe_is_resumed(monkeypatch):
    """Extra images, an ε that grows, an equal average with its own statistics, one cycle."""
    args = ["problems/atas.py", "--data", npz(), "--extra", npz("extra.npz", x_test=None, y_test=None), "--epochs", "3"]
    args += ["--extra-fraction", "0.4", "--epsilon-warmup", "2", "--average-from", "2", "--reestimate"]
    args += ["--schedule", "one-cycle", "--peak-momentum", "0.85", "--held-out", "12", "--model", "small_resnet"]
    args += ["--label-smoothing", "0.3", "--batch-size", "10", *SHORT[4:]]
    run(*args, "--out", "whole")
    epoch = Trainer.train_epoch

    def interrupted(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*args, "--out", "halves")
    run(*args, "--out", "halves", "--resume")
    assert same(weights("whole"), weights("halves"))
    averages = [torch.load(Path(out) / "last.pt", weights_only=True)["average"] for out in ("whole", "halves")]
    assert same(*averages) and not same(averages[0], weights("whole"))
    npz("extra.npz", y_train=np.arange(60) % 2, x_test=None, y_test=None)
    says = complaint(*args, "--out", "halves", "--resume")
    assert says == "halves was started with other extra images; the data has changed since"


def test_another_problem_file_that_an_argument_names_must_be_the_same():
    Path("inner.py").write_text("from bilevel_at.problems.fastat import problem\n")
    args = ["problems/awp.py", "--of", "inner.py", "--data", npz(), *SHORT, "--out", "out"]
    run(*args)
    run(*args, "--resume")
    Path("inner.py").write_text("from bilevel_at.problems.fgsm import problem\n")
    assert complaint(*args, "--resume") == "out was started with another inner.py; it has changed since"
