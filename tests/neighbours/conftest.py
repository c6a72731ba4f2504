"""The examples of docs/examples are run as they stand; a test looks at what they have computed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from bilevel_at import run as run_module

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of a few seconds on the digits."""
    path = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--epochs", "4", "--attacks", "clean", "--select", "pgd-2-1", "--test-examples", "60", "--out", str(path)]
    assert run_module.run(["fastbat", *flags]) == 0
    return path


@pytest.fixture
def example(tmp_path, monkeypatch):
    """``example(name, *words)`` runs ``python docs/examples/name.py words`` in this process; its names and values."""
    monkeypatch.chdir(tmp_path)

    def execute(name, *words):
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
        return runpy.run_path(str(path), run_name="__main__")

    return execute


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The test is in a directory of its own."""
    monkeypatch.chdir(tmp_path)
