"""Every named set from torchvision's own files, from archives that are there, and from an .npz."""

from __future__ import annotations

import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_files import (
    FETCH,
    agrees,
    everything,
    md5,
    pictures,
    write_cifar,
    write_fashion,
    write_svhn,
    write_tiny,
)
from PIL import Image
from torchvision import datasets

import bilevel_at as ba
from bilevel_at.data import downloads, load_data

pytestmark = pytest.mark.usefixtures("without_network")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_what_torchvision_unpacked(name, monkeypatch):
    written = write_cifar("data", name, monkeypatch)
    before = everything()
    train, test = load_data(name)
    agrees(train, *written["train"])
    agrees(test, *written["test"])
    assert (train.shape, train.classes, everything()) == ((3, 32, 32), 10, before)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_of_another_checksum_is_not_unpickled(name):
    class Evil:
        def __reduce__(self):
            return (Path("evil").touch, ())

    write_cifar("data", name)
    for file in Path("data").rglob("*"):
        if file.is_file():
            file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        ba.InputError, match="(data_batch_1|train) has another MD5 than .*, and downloads are off; put cifar10*.npz"
    ):
        load_data(name, download=False)
    assert not Path("evil").exists()


def test_svhn_from_its_mat_files(monkeypatch):
    written = write_svhn("data", monkeypatch)
    train, test = load_data("svhn", download=False)
    agrees(train, *written["train"])  # among them the zeros, which the files call 10
    agrees(test, *written["test"])
    with open("data/test_32x32.mat", "ab") as file:
        file.write(b"x")
    with pytest.raises(ba.InputError, match="or train_32x32.mat and test_32x32.mat"):
        load_data("svhn", download=False)


def test_fashion_mnist_from_its_idx_files():
    written = write_fashion("data")
    train, test = load_data("fashion_mnist")
    agrees(train, *written["train"])
    agrees(test, *written["test"])
    assert train.shape == (1, 28, 28)
    images = Path("data/FashionMNIST/raw/train-images-idx3-ubyte")
    for damaged in (b"", b"hello", images.read_bytes()[:1000]):
        images.write_bytes(damaged)
        with pytest.raises(ba.InputError, match="or FashionMNIST/raw/ with its four idx files"):
            load_data("fashion_mnist", download=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_tiny_imagenet_from_its_folder(workers, capsys):
    written = write_tiny("data")
    train, test = load_data("tiny_imagenet", workers=workers)
    agrees(train, *written["train"])
    agrees(test, *written["test"])
    assert train.shape == (3, 64, 64) and capsys.readouterr() == ("", "")


def test_mistakes_in_tiny_imagenet():
    write_tiny("data")
    folder = Path("data/tiny-imagenet-200")
    Image.new("RGB", (65, 64)).save(folder / "val/images/val_3.JPEG")
    line = r"val_3.JPEG cannot be read as an image: it is 65×64, and Tiny-ImageNet's images are 64×64"
    for workers in (0, 2):
        with pytest.raises(ba.InputError, match=line) as error:
            load_data("tiny_imagenet", workers=workers)
        assert "\n" not in str(error.value)
    (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn999\n")
    with pytest.raises(ba.InputError, match="names the class 'n999', for which .*train has no folder"):
        load_data("tiny_imagenet")
    shutil.rmtree(folder / "train")
    with pytest.raises(ba.InputError, match="or tiny-imagenet-200.zip"):
        load_data("tiny_imagenet", download=False)


def refuse(*args, **kwargs):
    raise OSError("no network in tests")


def test_archives_that_are_there_are_unpacked_without_a_network(monkeypatch):
    monkeypatch.setattr(downloads, "fetch", FETCH)
    monkeypatch.setattr("socket.create_connection", refuse)
    Path("data").mkdir()

    written = write_cifar("source", "cifar10", monkeypatch)
    with tarfile.open("data/cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add("source/cifar-10-batches-py", "cifar-10-batches-py")
    with pytest.raises(ba.InputError, match=r"the download failed \(no network in tests\)"):
        load_data("cifar10")  # its checksum is wrong
    assert everything("data") == ["data/cifar-10-python.tar.gz"]
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5("data/cifar-10-python.tar.gz"))
    agrees(load_data("cifar10", download=False)[0], *written["train"])

    written = write_fashion("data", zipped=True)
    of = datasets.FashionMNIST
    sums = [(file, md5(f"data/FashionMNIST/raw/{file}")) for file, _ in of.resources]
    monkeypatch.setattr(of, "resources", sums)
    agrees(load_data("fashion_mnist", download=False)[1], *written["test"])

    written = write_tiny("source")
    with zipfile.ZipFile("data/tiny-imagenet-200.zip", "w") as archive:
        for path in Path("source/tiny-imagenet-200").rglob("*"):
            archive.write(path, path.relative_to("source"))
    monkeypatch.setattr(downloads, "TINY_IMAGENET", (downloads.TINY_IMAGENET[0], md5("data/tiny-imagenet-200.zip")))
    agrees(load_data("tiny_imagenet", download=False, workers=0)[0], *written["train"])

    names = {p.name for p in Path("data").iterdir()}
    archives = {"cifar-10-python.tar.gz", "tiny-imagenet-200.zip"}
    assert names == {*archives, "SHA256SUMS", "cifar-10-batches-py", "FashionMNIST", "tiny-imagenet-200"}
    assert not any(p.is_symlink() for p in Path("data").rglob("*"))


def test_the_npz_comes_first(monkeypatch):
    write_fashion("data")
    x, y = pictures(30, seed=9)
    np.savez("data/fashion_mnist.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    agrees(load_data("fashion_mnist")[1], x[:10], y[:10])


def test_a_single_array_is_said_to_be_one():
    np.save("one.npy", np.zeros(3))
    Path("one.npy").rename("one.npz")
    with pytest.raises(ba.InputError, match=r"^one.npz is a single array; an .npz with x_train"):
        load_data("one.npz")
