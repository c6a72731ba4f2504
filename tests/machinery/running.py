"""What the tests of the run command share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.runs.problem_file import packaged_problems

ROOT = Path(__file__).resolve().parents[2]


SHORT = ["--epochs", "1", "--examples", "100", "--attacks", "clean", "pgd-2-1", "--select", "pgd-2-1"]
SHORT += ["--test-examples", "60"]


PROBLEMS = sorted(path.stem for path, _ in packaged_problems())


SOLVERS = ["zero-ig", "hessian-free-kkt", "full-kkt"]


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


def unchecked(*runs):
    """Delete the lists of hashes, as in runs of earlier versions: the files are read as they are."""
    for run in runs:
        for name in ("manifest.json", "manifest-before.json"):
            Path(run, name).unlink(missing_ok=True)


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


def weights(path):
    return torch.load(Path(path) / "last.pt", weights_only=True)["model"]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


FAST = "from bilevel_at.problems.fastat import problem\n\n"


OWN = """
import torch
from bilevel_at.problems.fastat import problem
def model(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, {width}))
"""
