"""Where the tests of the machinery run, and the networks and runs that several of them look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from attempting import alarmed
from benchmarking import FOLDER, small_data
from evaluating import cnn, mlp, trained
from matplotlib.figure import Figure
from reporting import PIXEL
from running import unchecked

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.data import downloads


@pytest.fixture(autouse=True)
def _quick_figures(request, monkeypatch):
    """Drawing takes four fifths of a small run: figures are one grey pixel, except in tests that ask for ``drawn``."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).write_bytes(PIXEL))


@pytest.fixture
def drawn():
    """Figures are drawn."""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The test is in a directory of its own, outside the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def without_network(elsewhere, monkeypatch):
    """A download is a failure of the test."""

    def forbidden(url, path):
        raise AssertionError(f"{url} would have been downloaded")

    monkeypatch.setattr(downloads, "fetch", forbidden)


@pytest.fixture
def small_cifar10(without_network, monkeypatch):
    """A data set of the name CIFAR-10, and the benchmark scripts' folder as Python has it for a script."""
    monkeypatch.syspath_prepend(FOLDER)
    small_data()


@pytest.fixture(scope="session")
def robust():
    return trained(mlp, "minmax", 15)


@pytest.fixture(scope="session")
def convolutional():
    return trained(cnn, "fastat", 15)


@pytest.fixture(scope="session")
def plain():
    return trained(cnn, "standard", 8)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A run of a few seconds, which nothing has been evaluated on."""
    path = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--epochs", "5", "--attacks", "clean", "--select", "pgd-2-1", "--out", str(path)]
    assert run_module.run(["problems/fastat.py", *flags]) == 0
    shutil.rmtree(path / "evaluation")
    (path / "results.json").unlink()
    return path


@pytest.fixture
def run_here(elsewhere, trained_run):
    """The run is in ``run`` and its weights in ``weights.pt``."""
    shutil.copytree(trained_run, "run")
    unchecked("run")  # the tests that use it change its files; test_damage.py has the manifest
    torch.save(ba.load("run", "last").state_dict(), "weights.pt")


@pytest.fixture
def bounded():
    """A case of a fuzz test that takes too long fails."""
    with alarmed():
        yield
