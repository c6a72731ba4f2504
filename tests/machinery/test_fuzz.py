"""No file of a run, of data or of weights ends in a traceback, hangs, or takes the memory: it is read, or refused.

Cases are drawn from seeds, so that a failure names the one that repeats it. ``BILEVEL_FUZZ=50000`` draws more of them.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from attempting import CASES, attempt, conclude
from fuzzing import damaged, damaged_checkpoint, damaged_npz

import bilevel_at as ba
from bilevel_at import run as main_job
from bilevel_at.commands.evaluate import command as evaluate
from bilevel_at.commands.report import command as report
from bilevel_at.data import load_data
from bilevel_at.data.npz import extra_from_npz
from bilevel_at.diagnose import read_history
from bilevel_at.runs.checkpoints import load_tensors
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.record import read

pytestmark = pytest.mark.usefixtures("bounded")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of every file of a small run, evaluated; ATAS, because it remembers."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    few = [
        "--epochs",
        "2",
        "--examples",
        "40",
        "--test-examples",
        "8",
        "--attacks",
        "clean",
        "fgsm",
        "--select",
        "fgsm",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        main_job.run(["problems/atas.py", *few, "--model", "one_layer_cnn", "--out", str(folder)])
        evaluate([str(folder), "--attacks", "pgd-2-1", "--examples", "8", "--checks", "4", "--problem-file"][:-1])
    names = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in (".json", ".jsonl", ".npz", ".pt")]
    return folder, {str(p.relative_to(folder)): p.read_bytes() for p in names}


def readers(folder):
    """What reads a run from Python, by name."""
    return {
        "the record": lambda: read(folder),
        "the record's parts": lambda: [
            getattr(read(folder), n) for n in ("threat", "best_epoch", "collapse", "examples")
        ],
        "the history": lambda: read_history(folder),
        "load": lambda: ba.load(folder),
        "load last": lambda: ba.load(folder, "last"),
        "metrics": lambda: RunDir(folder).metrics(),
        "checkpoint": lambda: RunDir(folder).checkpoint("last"),
    }


def one_damaged(files, tmp_path, r):
    """A copy of the run with damage in a file; which one."""
    _, contents = files
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    name = r.choice(sorted(contents))
    # Mostly without the SHA-256 that would refuse the file before it is read: an author can write hashes, too.
    unlisted = not name.startswith("manifest") and r.random() < 0.8
    for each, content in contents.items():
        if unlisted and each.startswith("manifest"):
            continue
        (folder / each).parent.mkdir(parents=True, exist_ok=True)
        (folder / each).write_bytes(damaged(each, content, r) if each == name else content)
    return folder, name


@pytest.mark.slow
def test_runs_are_read_or_refused(files, tmp_path):
    failures, tally = [], Counter()
    for seed in range(CASES):
        r = random.Random(seed)
        folder, name = one_damaged(files, tmp_path, r)
        for what, action in readers(folder).items():
            failures += filter(None, [attempt(seed, f"{name}, {what}", action, tally)])
    conclude(failures, tally)


def resumed(folder):
    few = ["--epochs", "2", "--examples", "40", "--test-examples", "8", "--attacks", "clean", "--select", "fgsm"]
    main_job.run(["problems/atas.py", *few, "--model", "one_layer_cnn", "--out", str(folder), "--resume"])


@pytest.mark.parametrize(
    ("what", "share"),
    [
        pytest.param("report", 20, marks=pytest.mark.slow),
        pytest.param("evaluate", 10, marks=pytest.mark.slow),
        pytest.param("resume", 10, marks=pytest.mark.slow),
    ],
)
def test_commands_end_in_an_answer_or_a_line(files, tmp_path, what, share):
    """One case in ``share`` of the reading test's, because a command takes longer."""
    actions = {
        "report": lambda folder: report([str(folder), "--no-measure", "--out", str(tmp_path / "page")]),
        "evaluate": lambda folder: evaluate([str(folder), "--attacks", "clean", "--examples", "8", "--checks", "0"]),
        "resume": resumed,
    }
    failures, tally = [], Counter()
    for seed in range(CASES // share):
        r = random.Random(10**6 + seed)
        folder, name = one_damaged(files, tmp_path, r)
        failures += filter(None, [attempt(seed, f"{name}, {what}", partial(actions[what], folder), tally)])
    conclude(failures, tally)


def test_data_is_read_or_refused(tmp_path):
    g = np.random.default_rng(0)
    arrays = {
        "x_train": g.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), "y_train": np.arange(40) % 4,
        "x_test": g.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), "y_test": np.arange(12) % 4,
    }  # fmt: skip
    whole = io.BytesIO()
    np.savez(whole, **arrays)
    path, failures, tally = tmp_path / "data.npz", [], Counter()
    np.savez(tmp_path / "whole.npz", **arrays)
    train, _ = load_data(str(tmp_path / "whole.npz"))
    for seed in range(CASES):
        path.write_bytes(damaged_npz(whole.getvalue(), random.Random(seed)))
        failures += filter(None, [attempt(seed, "data", lambda: load_data(str(path)), tally)])
        failures += filter(None, [attempt(seed, "extra", lambda: extra_from_npz(path, train), tally)])
    conclude(failures, tally)


def test_weights_are_read_or_refused(files, tmp_path):
    _, contents = files
    path, failures, tally = tmp_path / "weights.pt", [], Counter()
    flags = [
        "--model",
        "one_layer_cnn",
        "--data",
        "digits",
        "--epsilon",
        "0.2",
        "--attacks",
        "clean",
        "--examples",
        "8",
    ]
    for seed in range(CASES // 4):
        path.write_bytes(damaged_checkpoint(contents["best.pt"], random.Random(seed)))
        failures += filter(None, [attempt(seed, "load_tensors", lambda: load_tensors(path), tally)])
        if seed % 10 == 0:
            out = ["--out", str(tmp_path / f"out{seed}"), "--checks", "0"]
            failures += filter(None, [attempt(seed, "evaluate", partial(evaluate, [str(path), *flags, *out]), tally)])
    conclude(failures, tally)


def test_what_is_damaged_is_damaged(files):
    """The damage is not all of one kind: of 300 cases most differ from the file and from each other."""
    _, contents = files
    made = {damaged(name, contents[name], random.Random(seed)) for seed in range(300) for name in [sorted(contents)[0]]}
    assert len(made) > 200 and torch.load(io.BytesIO(contents["last.pt"]), weights_only=True)["format"] >= 2
