"""What the tests of the evaluate command share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import bilevel_at as ba
from bilevel_at.commands.evaluate import command

EPS = 0.2


PYTHON = [sys.executable, "-m", "bilevel_at.evaluate"]


def evaluate(*args):
    assert command([str(a) for a in args]) == 0


def complaint(*args):
    """What the command says of a mistake; it must be one line, and nothing may have been written."""
    before = {p: p.is_file() and p.stat().st_mtime_ns for p in sorted(Path().rglob("*"))}
    with pytest.raises((ba.InputError, ba.BilevelError)) as error:
        command([str(a) for a in args])
    assert {p: p.is_file() and p.stat().st_mtime_ns for p in sorted(Path().rglob("*"))} == before
    line = str(error.value)
    assert line.isprintable() and len(line) < 400
    return line


def read(path):
    return json.loads(Path(path).read_text())


def arrays(path):
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


QUICK = ["--checks", 0]


ONE = ["--which", "last", *QUICK]


CHECKPOINT = ["weights.pt", "--model", "small_cnn", "--epsilon", EPS]
