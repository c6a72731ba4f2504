"""What the tests of damaged and interrupted runs share: a run, unbroken and stopped, and what counts as the same."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.manifest import DamageWarning
from bilevel_at.train import Trainer

EPOCHS = 4
ARGS = ["--examples", "60", "--test-examples", "20", "--attacks", "clean", "--select", "fgsm", "--epochs", str(EPOCHS)]


def command(problem, out, *more):
    return [f"problems/{problem}.py", *ARGS, "--out", str(out), *more]


def stopped_run(problem, out, epochs):
    """A run that Ctrl-C stops after this many epochs."""
    epoch = Trainer.train_epoch

    def stop(self, number):
        if number == epochs:
            raise KeyboardInterrupt
        return epoch(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            run_module.run(command(problem, out))


def flat(value, path=""):
    """Every tensor and value of a nested state, by path."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{path}/{i}").items()}
    return {path: value}


def content(out):
    """All that training has left, without times."""
    run = RunDir(out)
    timed = ("seconds", "train_seconds")
    return flat(
        {
            **{which: run.checkpoint(which) for which in run.checkpoints},
            "history": {name: torch.from_numpy(array) for name, array in run.arrays("history.npz").items()},
            "metrics": [{k: v for k, v in line.items() if k not in timed} for line in run.metrics()],
        }
    )


def same(one, other):
    def equal(a, b):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy(), equal_nan=a.is_floating_point())
        return a == b

    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


def heard(action, *args):
    """The result, and the lines that were said: warnings of damage, or one refusal, after which the result is None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, lines = action(*args), []
        except (ba.InputError, ba.BilevelError) as error:
            result, lines = None, [str(error)]
    lines += [str(warning.message) for warning in caught if issubclass(warning.category, DamageWarning)]
    assert all("\n" not in line and len(line) < 500 for line in lines), lines
    return result, lines


def go_on(problem, out):
    return run_module.run(command(problem, out, "--resume"))


def files_of(out):
    """The files that the manifest lists or that stand in for them, by path in the run; figures are not among them."""
    paths = (path for path in sorted(Path(out).rglob("*")) if path.is_file() and "figures" not in path.parts)
    return [path.relative_to(out).as_posix() for path in paths]


def flip(path, bit):
    data = bytearray(Path(path).read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    Path(path).write_bytes(data)


def damage(kind, path, foreign):
    """Truncate the file, empty it, delete it, or put one of another run in its place."""
    if kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    else:
        shutil.copy(foreign, path)


def json_of(path):
    return json.loads(Path(path).read_text())
