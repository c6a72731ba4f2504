"""The evaluate command: results, what is reused, and what is shown."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from evaluating_runs import EPS, ONE, PYTHON, QUICK, arrays, complaint, evaluate, read
from running import unchecked

from bilevel_at import run as run_module
from bilevel_at.commands.evaluate import command
from bilevel_at.data import load_data
from bilevel_at.evaluate import ATTACKS

pytestmark = pytest.mark.usefixtures("run_here")


def test_results_say_what_they_are(capsys):
    evaluate("run", "--attacks", "clean", "fgsm", "pgd-5-2", "beta-3", "--epsilon", EPS, "8/255", "--examples", 30)
    shown = capsys.readouterr().out
    results = read("run/results.json")
    assert set(results) == {"best", "last"}
    names = {"clean", "fgsm", "pgd-5-2", "beta-3", "fgsm@8/255", "pgd-5-2@8/255", "beta-3@8/255"}
    for which, entries in results.items():
        assert set(entries) == names
        for name, entry in entries.items():
            attack, _, radius = name.partition("@")
            assert (entry["attack"], entry["n"]) == (attack, 30) and entry["seconds"] >= 0
            assert entry["norm"] == (None if attack == "clean" else "linf")
            assert entry["epsilon"] == (0 if attack == "clean" else 8 / 255 if radius else EPS)
            assert {"torch", "pyautoattack", "bilevel-at", "python"} <= set(entry["versions"])
            assert re.fullmatch("[0-9a-f]{16}", entry["data"]) and re.fullmatch("[0-9a-f]{16}", entry["weights"])
            file = arrays(Path("run", entry["file"]))
            assert file["correct"].mean() == pytest.approx(entry["accuracy"]) and file["correct"].shape == (30,)
            assert file["label"].shape == (30,) and (file["correct"] == (file["broken"] == -1)).all()
            assert bool(file["finished"]) and ((file["said"] == file["label"]) == file["correct"]).all()
            assert f"{which}  {name}  {entry['accuracy']:.1%}" in shown
        assert entries["pgd-5-2"]["accuracy"] <= entries["pgd-5-2@8/255"]["accuracy"] <= entries["clean"]["accuracy"]
    assert results["best"]["clean"]["data"] == results["last"]["clean"]["data"]
    checks = read("run/checks.json")
    assert set(checks) == {"best", "last"} and checks["last"]["measured"]["n"] == 30
    assert all(set(w) == {"name", "message"} for entry in checks.values() for w in entry["warnings"])


def test_what_is_there_is_not_computed_again():
    evaluate("run", "--attacks", "clean", "pgd-5-2", "--checks", 20)
    first, files = read("run/results.json"), {p: p.read_bytes() for p in Path("run").rglob("*.npz")}
    evaluate("run", "--attacks", "clean", "pgd-5-2", "--checks", 20)
    assert read("run/results.json") == first
    assert all(p.read_bytes() == content for p, content in files.items())
    assert len(read("run/evaluation/commands.json")) == 1
    evaluate("run", "--attacks", "clean", "pgd-5-2", "--again", "--which", "last", "--checks", 20)
    again = read("run/results.json")
    assert again["best"] == first["best"] and again["last"] != first["last"]
    assert again["last"]["pgd-5-2"]["accuracy"] == first["last"]["pgd-5-2"]["accuracy"]
    evaluate("run", "--attacks", "pgd-5-2", "--examples", 100, *ONE)
    fewer = read("run/results.json")["last"]
    assert fewer["pgd-5-2"] == again["last"]["pgd-5-2"] and fewer["pgd-5-2[n=100]"]["n"] == 100


def test_l2_and_a_curve_beside_what_is_there():
    evaluate("run", "--attacks", "pgd-5-1", *ONE)
    before = read("run/results.json")["last"]["pgd-5-1"]
    evaluate("run", "--attacks", "pgd-5-1", "--norm", "l2", "--epsilon", "0.5", *ONE)
    after = read("run/results.json")["last"]
    assert after["pgd-5-1"] == before
    (other,) = (entry for entry in after.values() if entry["norm"] == "l2")
    assert other["epsilon"] == 0.5 and other["accuracy"] != before["accuracy"]
    assert "--epsilon" in complaint("run", "--norm", "l2", *ONE)  # 0.2 is the radius of another ball


def test_transfer_from_another_run():
    flags = ["--epochs", "1", "--examples", "100", "--attacks", "clean", "--select", "pgd-2-1", "--out", "other"]
    assert run_module.run(["problems/standard.py", *flags]) == 0
    attacks = ["transfer:other", "transfer:other:fgsm", "transfer:run:fgsm", "pgd-50-1", "fgsm"]
    evaluate("run", "--attacks", *attacks, "--which", "best", *QUICK, "--examples", 30)
    found = read("run/results.json")["best"]
    assert set(found) == set(attacks)
    assert found["transfer:other"]["accuracy"] >= found["pgd-50-1"]["accuracy"]
    assert found["transfer:run:fgsm"]["accuracy"] == found["fgsm"]["accuracy"]  # the network itself
    unchecked("other")
    shutil.copy("run/last.pt", "other/best.pt")
    evaluate("run", "--attacks", *attacks, "--which", "best", *QUICK, "--examples", 30)
    assert read("run/results.json")["best"]["transfer:other:fgsm"] != found["transfer:other:fgsm"]  # another surrogate


def test_help_and_list(capsys):
    for args in (["--help"], [], ["-h"]):
        assert command(args) == 0
        assert "usage: python -m bilevel_at.evaluate RUN" in capsys.readouterr().out
    assert command(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and about in listed for name, about in ATTACKS.items())
    with pytest.raises(SystemExit) as end:
        command(["run", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{flag}" in shown for flag in ("attacks", "epsilon", "norm", "which", "examples", "again", "seed"))


@pytest.mark.slow
def test_a_mistake_ends_the_process_with_2():
    done = subprocess.run([*PYTHON, "run", "--epsilon", "-1"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("bilevel_at.evaluate: epsilon is -1")


def test_checks_are_of_the_images_at_hand():
    """Other labels for the same network: what was measured before says nothing about them."""
    train, test = load_data("digits")
    x = {"x_train": train.x.numpy(), "x_test": test.x.numpy()}
    np.savez("moved.npz", **x, y_train=train.y.numpy(), y_test=(test.y.numpy() + 1) % 10)
    evaluate("run", "--attacks", "clean", "--which", "last", "--checks", 50)
    assert read("run/checks.json")["last"]["measured"]["fgsm"] > 0.1
    evaluate("run", "--attacks", "clean", "--which", "last", "--checks", 50, "--data", "moved.npz")
    assert read("run/checks.json")["last"]["measured"]["fgsm"] < 0.1


def test_large_seeds_are_seeds():
    evaluate("run", "--attacks", "pgd-2-1", "apgd-ce", "--seed", 2**32 - 1, "--examples", 5, *ONE)
    assert read("run/results.json")["last"]["pgd-2-1"]["seed"] == 2**32 - 1


def test_a_network_of_the_problem_file_and_other_images():
    Path("mine.py").write_text(
        "import torch\nimport bilevel_at as ba\nfrom bilevel_at.problems.fastat import problem\n"
        "def model(shape, classes):\n    d = shape[0] * shape[1] * shape[2]\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(d, classes))\n"
    )
    g = np.random.default_rng(0)
    x = g.integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    np.savez("data.npz", x_train=x, y_train=np.arange(40) % 5, x_test=x[:20], y_test=np.arange(20) % 5)
    flags = ["--data", "data.npz", "--epochs", "1", "--attacks", "clean", "--select", "pgd-1-1", "--model", "file"]
    assert run_module.run(["mine.py", *flags, "--epsilon", "0.1", "--out", "mine"]) == 0
    named = ["--problem-file", "mine.py"]
    evaluate("mine", "--attacks", "clean", "pgd-3-1", "autoattack-rand", "--which", "last", *named)
    assert read("mine/results.json")["last"]["pgd-3-1"]["n"] == 20
    assert "was trained on images of" in complaint("mine", "--data", "digits", *named)
    line = complaint("run", "--attacks", "transfer:mine", "--which", "last", *named)
    assert "mine" in line  # a surrogate for images of another shape
