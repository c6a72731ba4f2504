"""Data sets by name, and where they come from: an ``.npz``, torchvision's own files, or a download."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .folders import imagenet, tiny_imagenet
from .npz import ARRAYS, checked, from_npz
from .sets import Images, ImageSet
from .staging import staged
from .stream import default_workers

__all__ = ["DATA_NAMES", "NotThere", "load_data", "stand_in"]

DATA_NAMES = {
    "digits": "1,797 handwritten digits, 8×8, 10 classes, embedded in scikit-learn",
    "fashion_mnist": "70,000 images of clothing, 28×28, 10 classes",
    "cifar10": "60,000 colour images, 32×32, 10 classes",
    "cifar100": "60,000 colour images, 32×32, 100 classes",
    "svhn": "99,289 street-view digits, 32×32, 10 classes",
    "tiny_imagenet": "110,000 colour images, 64×64, 200 classes",
    "imagenet": "1.3 million colour images, seen at 224×224, 1,000 classes",
}

FILES = {
    "fashion_mnist": "FashionMNIST/raw/ with its four idx files",
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "tiny_imagenet": "tiny-imagenet-200.zip",
    "imagenet": "imagenet/ with folders train/ and val/ of class folders, or with ILSVRC2012's three archives",
}
"""What, put into the data folder, makes a set loadable besides its ``.npz``."""

TRAINING_SETS = {
    "fashion_mnist": (60_000, (1, 28, 28), 10),
    "cifar10": (50_000, (3, 32, 32), 10),
    "cifar100": (50_000, (3, 32, 32), 100),
    "svhn": (73_257, (3, 32, 32), 10),
    "tiny_imagenet": (100_000, (3, 64, 64), 200),
    "imagenet": (1_281_167, (3, 224, 224), 1_000),
}
"""Images, their shape, and classes."""

TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
TIMEOUT = 30  # seconds without a byte


class NotThere(InputError):
    """A named data set is not in the data directory, and has not been downloaded."""


def stand_in(name: str) -> Images:
    """A training set as large as the one of that name, of one random image: for what asks for sizes alone.

    It takes the memory of one image, and so does a slice of it.
    """
    count, shape, classes = TRAINING_SETS[name]
    image = torch.randint(0, 256, (1, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Images(image.expand(count, *shape), torch.arange(count) % classes, classes)


def load_data(
    name: str, data_dir: str | Path = "data", download: bool = True, workers: int | None = None
) -> tuple[ImageSet, ImageSet]:
    """(training set, test set) of a known name, or of the ``.npz`` file of that path.

    An ``.npz`` holds ``x_train``, ``y_train``, ``x_test``, ``y_test``: images NHWC or NCHW (or NHW), uint8, or floating
    point in [0, 1]; a second axis of 1 or 3 is read as the channels. Pickled arrays are refused.

    A known name is ``data_dir/NAME.npz``, or else what torchvision's class of that name finds in ``data_dir``, or else,
    with ``download``, is downloaded to there. Everything that torchvision unpickles it first compares with a checksum.
    The digits need no file; ImageNet cannot be downloaded, and is the only one that is :class:`Streamed`.

    workers: processes that decode image files (0: this one); as many as there are CPUs, at most 8, if not given.

    Raises :class:`InputError`, saying what to put where (:class:`NotThere`, where a known name is not there); then
    nothing has been left in ``data_dir``.
    """
    if name.endswith(".npz"):
        return from_npz(Path(name))
    if name == "digits":
        return _digits()
    if name not in DATA_NAMES:
        raise InputError(
            f"data {name!r} is not known; choose from {', '.join(DATA_NAMES)}, or give the path of an .npz file"
        )
    if workers is not None and workers < 0:
        raise InputError(f"workers is {workers}; it must be at least 0")
    data_dir, workers = Path(data_dir).expanduser(), default_workers() if workers is None else workers
    if (data_dir / f"{name}.npz").exists():
        return from_npz(data_dir / f"{name}.npz")
    if name == "imagenet":
        try:
            return imagenet(data_dir, workers)
        except FileNotFoundError:
            raise _not_there(name, data_dir, "it cannot be downloaded") from None
    arrays = _arrays(name, data_dir, workers)
    if arrays is None:
        _obtain(name, data_dir, download)
        arrays = _arrays(name, data_dir, workers)
    if arrays is None:
        raise _not_there(name, data_dir, "what was downloaded cannot be read")
    return checked(f"{name} in {data_dir}", arrays)


def _digits() -> tuple[Images, Images]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=360, random_state=0, stratify=y)

    def images(values: np.ndarray, labels: np.ndarray) -> Images:
        pixels = torch.from_numpy(values / 16).float().reshape(-1, 1, 8, 8)
        return Images(pixels, torch.from_numpy(labels).long(), 10)

    return images(x_train, y_train), images(x_test, y_test)


def _arrays(name: str, folder: Path, workers: int) -> dict[str, np.ndarray] | None:
    """What is in ``folder``; None where it is not there, or not whole."""
    try:
        if name == "tiny_imagenet":
            return tiny_imagenet(folder / "tiny-imagenet-200", workers)
        splits = _torchvision(name, folder)
    except InputError:
        raise
    except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError):  # of damaged files, too
        return None
    arrays = {}
    for split, images in zip(("train", "test"), splits, strict=True):
        arrays[f"x_{split}"] = np.asarray(images.data)
        arrays[f"y_{split}"] = np.asarray(images.labels if name == "svhn" else images.targets)
    return arrays


def _torchvision(name: str, folder: Path, download: bool = False) -> list[Any]:
    """torchvision's training and test set. It raises RuntimeError where a file is missing, or has another checksum."""
    from torchvision import datasets

    if name == "svhn":
        return [datasets.SVHN(str(folder), split, download=download) for split in ("train", "test")]
    of = {"fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    return [of(str(folder), train, download=download) for train in (True, False)]


def _archives(name: str) -> dict[str, str]:
    """What a download brings, with its MD5."""
    from torchvision import datasets

    if name == "tiny_imagenet":
        url, md5 = TINY_IMAGENET
        return {Path(url).name: md5}
    if name == "svhn":
        return {file: md5 for _, file, md5 in (datasets.SVHN.split_list[split] for split in ("train", "test"))}
    if name == "fashion_mnist":
        return {f"FashionMNIST/raw/{file}": md5 for file, md5 in datasets.FashionMNIST.resources}
    of = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    return {of.filename: of.tgz_md5}


def _obtain(name: str, data_dir: Path, download: bool) -> None:
    """Put a set's files into ``data_dir``: from the archives that are there, and for the rest, from the network."""
    from torchvision.datasets.utils import check_integrity

    if data_dir.exists() and not data_dir.is_dir():
        raise InputError(f"the data folder {data_dir} is a file; name a folder with --data-dir")
    archives = _archives(name)
    here = [file for file, md5 in archives.items() if check_integrity(data_dir / file, md5)]
    if not download and len(here) < len(archives):
        raise _not_there(name, data_dir, "downloads are off")
    what = "the download" if len(here) < len(archives) else "unpacking"
    if what == "the download":
        print(f"downloading {name} into {data_dir}/", file=sys.stderr)
    try:
        with staged(data_dir, links=here) as stage:
            fetch(name, stage)
    except Exception as error:  # networks, archives and disks fail in many ways: the data are not there
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[-1].removeprefix("<urlopen error ").removesuffix(">")
        raise _not_there(name, data_dir, f"{what} failed ({reason[:90]})") from None


def fetch(name: str, folder: Path) -> None:
    """Download a set into ``folder`` and unpack it; archives that are there already are not downloaded again.

    Nothing else uses the network: a test that must not replaces this function.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision would wait for ever
    try:
        if name == "tiny_imagenet":
            url, md5 = TINY_IMAGENET
            download_and_extract_archive(url, str(folder), md5=md5)
        else:
            _torchvision(name, folder, download=True)
    finally:
        socket.setdefaulttimeout(before)


def _not_there(name: str, data_dir: Path, why: str) -> NotThere:
    return NotThere(
        f"data set {name} is not in {data_dir}/, or not whole, and {why}; put {name}.npz (arrays {', '.join(ARRAYS)}) "
        f"into {data_dir}/, or {FILES[name]}, or name another folder with --data-dir"
    )
