"""Downloads, which fail in many ways and then leave nothing."""

from __future__ import annotations

import shutil
import urllib.error
from pathlib import Path

import pytest
from data_files import (
    agrees,
    everything,
    write_cifar,
)

import bilevel_at as ba
from bilevel_at.data import load_data, named

pytestmark = pytest.mark.usefixtures("without_network")


@pytest.fixture
def network(monkeypatch):
    """``network(write)``: what a download does, given the folder it writes into."""

    def says(write):
        monkeypatch.setattr(named, "fetch", lambda name, folder: write(folder))

    return says


TORCHVISION = ["fashion_mnist", "cifar10", "cifar100", "svhn", "tiny_imagenet"]


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (urllib.error.URLError("[Errno -2] Name or service not known"), "[Errno -2] Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
        (RuntimeError("Error downloading x:\nTried http://y, got:\n<urlopen error no route>\n"), "no route"),
        (RuntimeError("File not found or corrupted."), "File not found or corrupted."),
        (EOFError(), "EOFError"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_failed_download_leaves_nothing(name, error, said, there, network):
    def write(folder):
        Path(folder, "half", "made").mkdir(parents=True)
        Path(folder, "half", "file").touch()
        raise error

    network(write)
    if there:
        Path("data/mine").mkdir(parents=True)
    before = everything()
    with pytest.raises(ba.InputError) as caught:
        load_data(name, "data")
    line = str(caught.value)
    assert everything() == before
    assert "\n" not in line and len(line) < 400
    assert f"the download failed ({said}); put {name}.npz (arrays x_train, y_train, x_test, y_test) into data/" in line


def test_an_interrupted_download_leaves_nothing(network):
    def write(folder):
        Path(folder, "file").touch()
        raise KeyboardInterrupt

    network(write)
    with pytest.raises(KeyboardInterrupt):
        load_data("svhn")
    assert everything() == []


def test_downloads_that_are_off_are_not_tried():
    for name in TORCHVISION:
        with pytest.raises(ba.InputError, match="and downloads are off; put"):
            load_data(name, download=False)
    Path("data").touch()
    with pytest.raises(ba.InputError, match="the data folder data is a file"):
        load_data("svhn")


def test_what_was_downloaded_is_loaded_and_stays(network, monkeypatch, capsys):
    written = write_cifar("source", "cifar10", monkeypatch)
    network(lambda folder: shutil.copytree("source", folder, dirs_exist_ok=True))
    Path("deep/data/cifar-10-batches-py").mkdir(parents=True)
    Path("deep/data/cifar-10-batches-py/data_batch_1").write_text("half of it")
    Path("deep/data/other").touch()
    train, _ = load_data("cifar10", "deep/data")
    agrees(train, *written["train"])
    assert "downloading cifar10 into deep/data/" in capsys.readouterr().err
    copied = [f"deep/data{p.removeprefix('source')}" for p in everything("source")]
    assert everything("deep/data") == sorted([*copied, "deep/data/other"])
    network(lambda folder: pytest.fail("a second time"))
    again, _ = load_data("cifar10", "deep/data")
    assert again.sha256() == train.sha256()


def test_a_download_that_is_something_else(network):
    network(lambda folder: Path(folder, "page.html").touch())
    with pytest.raises(ba.InputError, match="what was downloaded cannot be read; put svhn.npz"):
        load_data("svhn", "data")
