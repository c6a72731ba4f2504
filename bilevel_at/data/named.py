"""Data sets by name, and where they come from: an ``.npz``, torchvision's own files, or a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from .downloads import NotObtained, obtain
from .folders import imagenet, tiny_imagenet
from .npz import ARRAYS, checked, from_npz
from .raw_files import NotWhole, arrays_of
from .sets import Images, ImageSet
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
"""Data sets by name, and what each is, as ``--list`` prints it."""

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

    A known name is ``data_dir/NAME.npz``, or else the files that torchvision's class of that name keeps in
    ``data_dir``, or else, with ``download``, is downloaded to there. What is unpickled is first compared with its
    checksum.
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
            mistake = NotWhole("there are no folders train and val")
            raise _not_there(name, data_dir, mistake, "it cannot be downloaded") from None
    try:
        arrays = _arrays(name, data_dir, workers)
    except NotWhole as mistake:
        arrays = _obtained(name, data_dir, download, workers, mistake)
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


def _arrays(name: str, folder: Path, workers: int) -> dict[str, np.ndarray]:
    """What is in ``folder``. Raises :class:`NotWhole` where it is not there, or not whole."""
    if name == "tiny_imagenet":
        return tiny_imagenet(folder / "tiny-imagenet-200", workers)
    return arrays_of(name, folder)


def _obtained(name: str, data_dir: Path, download: bool, workers: int, mistake: NotWhole) -> dict[str, np.ndarray]:
    """The same after a download, or after unpacking an archive that is there; ``mistake`` is why that is needed."""
    if data_dir.exists() and not data_dir.is_dir():
        raise InputError(f"the data folder {data_dir} is a file; name a folder with --data-dir")
    try:
        obtain(name, data_dir, download)
    except NotObtained as error:
        raise _not_there(name, data_dir, mistake, str(error)) from None
    try:
        return _arrays(name, data_dir, workers)
    except NotWhole as error:
        raise _not_there(name, data_dir, error, "that is what was downloaded") from None


def _not_there(name: str, data_dir: Path, mistake: NotWhole, why: str) -> NotThere:
    return NotThere(
        f"data set {name} is not in {data_dir}/, or not whole: {mistake}, and {why}; put {name}.npz "
        f"(arrays {', '.join(ARRAYS)}) into {data_dir}/, or {FILES[name]}, or name another folder with --data-dir"
    )
