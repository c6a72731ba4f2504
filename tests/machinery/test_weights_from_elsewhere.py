"""The evaluate command on weights from elsewhere."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from evaluating_runs import CHECKPOINT, ONE, PYTHON, QUICK, arrays, complaint, evaluate, read

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.models import build_model

pytestmark = pytest.mark.usefixtures("run_here")


def correct(path="weights-evaluation"):
    return arrays(Path(path, read(Path(path, "results.json"))["model"]["pgd-5-1"]["file"]))["correct"]


WRAPPED = {
    "plain": lambda s: s,
    "in a state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "in a model": lambda s: {"model": s, "best_acc": 0.5, "note": "mine"},
    "twice": lambda s: {"net": {"state_dict": s}},
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "module. in a state_dict": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "module._orig_mod.": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "_orig_mod.module.": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_state_dict(how):
    evaluate("run", "--attacks", "pgd-5-1", *ONE)
    expected = arrays(Path("run/evaluation/last/pgd-5-1.npz"))["correct"]
    state = torch.load("weights.pt", weights_only=True)
    torch.save(WRAPPED[how](state), "weights.pt")
    evaluate(*CHECKPOINT, "--attacks", "clean", "pgd-5-1", *QUICK)
    assert (correct() == expected).all()
    assert set(read("weights-evaluation/results.json")) == {"model"}
    torch.save(WRAPPED[how]({k.removeprefix("network."): v for k, v in state.items() if "." in k}), "inner.pt")
    assert "does not say how inputs are normalised; give --mean and --std" in complaint(
        "inner.pt", *CHECKPOINT[1:], *QUICK
    )
    mean, std = (float(state[k].flatten()[0]) for k in ("mean", "std"))
    evaluate("inner.pt", *CHECKPOINT[1:], "--mean", mean, "--std", std, "--attacks", "pgd-5-1", *QUICK, "--out", "in")
    assert (correct("in") == expected).all()


def test_weights_are_what_the_network_is():
    """The same file as another network (here its activation) is another network: nothing is reused."""
    evaluate(*CHECKPOINT, "--attacks", "clean", *QUICK)
    first = read("weights-evaluation/results.json")["model"]["clean"]
    try:
        evaluate(*CHECKPOINT, "--attacks", "clean", *QUICK, "--activation", "softplus")
    except ba.InputError:
        return  # to refuse would be right, too
    model = build_model("small_cnn", (1, 8, 8), 10, activation="softplus")
    model.load_state_dict(torch.load("weights.pt", weights_only=True))
    test = load_data("digits")[1]
    with torch.no_grad():
        expected = (model.eval()(test.x).argmax(1) == test.y).float().mean().item()
    second = read("weights-evaluation/results.json")["model"]["clean"]
    assert expected != first["accuracy"] and second["accuracy"] == pytest.approx(expected)


def test_weights_twice_by_two_names_of_the_same_file():
    evaluate(*CHECKPOINT, "--attacks", "clean", *QUICK)
    evaluate(Path("weights.pt").resolve(), *CHECKPOINT[1:], "--attacks", "fgsm", *QUICK)
    assert set(read("weights-evaluation/results.json")["model"]) == {"clean", "fgsm"}


@pytest.mark.slow
def test_a_checkpoint_that_contains_itself():
    recursive = {}
    recursive["model"] = recursive
    torch.save(recursive, "weights.pt")
    done = subprocess.run([*PYTHON, *map(str, CHECKPOINT)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
