"""The arrays of data sets in torchvision's files: idx, CIFAR's pickles, SVHN's MATLAB files."""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import struct
from pathlib import Path

import numpy as np

from ..errors import InputError

__all__ = ["NotWhole", "content_of", "arrays_of"]

MOST = 2**28  # bytes of one file; the largest, SVHN's training images, has 182 MB


class NotWhole(InputError):
    """A file of a data set is missing, or is another one than it should be."""


def content_of(path: Path, most: int = MOST) -> bytes:
    """What is in a file. Raises :class:`NotWhole` where there is no file, or one of more than ``most`` bytes."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise NotWhole(f"{path} is {'no file' if os.path.exists(path) else 'missing'}")
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise NotWhole(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > most:
        raise NotWhole(f"{path} has more than {most:,} bytes, which is not the file of that name")
    return content


def arrays_of(name: str, folder: Path) -> dict[str, np.ndarray]:
    """``x_train``, ``y_train``, ``x_test``, ``y_test`` of a set by name, from the files that torchvision keeps.

    What is unpickled, or read by SciPy, has the MD5 that torchvision has for it; the bytes compared are those read.
    Raises :class:`NotWhole` where a file is missing or another one.
    """
    read = {"fashion_mnist": _fashion_mnist, "svhn": _svhn, "cifar10": _cifar, "cifar100": _cifar}[name]
    arrays = {}
    for split in ("train", "test"):
        arrays[f"x_{split}"], arrays[f"y_{split}"] = read(name, folder, split)
    return arrays


def _checked(path: Path, md5: str) -> bytes:
    content = content_of(path)
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise NotWhole(f"{path} has another MD5 than {md5}, and is not read")
    return content


def _cifar(name: str, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    from torchvision import datasets

    of = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    labels = "labels" if name == "cifar10" else "fine_labels"
    files = [(folder / of.base_folder / file, md5) for file, md5 in getattr(of, f"{split}_list")]
    parts = [pickle.loads(_checked(path, md5), encoding="latin1") for path, md5 in files]
    x = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    return x, np.concatenate([part[labels] for part in parts])


def _svhn(name: str, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    from scipy.io import loadmat
    from torchvision import datasets

    _, file, md5 = datasets.SVHN.split_list[split]
    arrays = loadmat(io.BytesIO(_checked(folder / file, md5)))
    return arrays["X"].transpose(3, 2, 0, 1), arrays["y"].astype(np.int64).flatten() % 10  # zeros are called 10


def _fashion_mnist(name: str, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    raw, kind = folder / "FashionMNIST" / "raw", "train" if split == "train" else "t10k"
    return _idx(raw / f"{kind}-images-idx3-ubyte", (28, 28)), _idx(raw / f"{kind}-labels-idx1-ubyte", ()).astype(
        np.int64
    )


def _idx(path: Path, shape: tuple[int, ...], most: int = 60_000) -> np.ndarray:
    """At most ``most`` arrays of bytes of that shape; no MD5 is known of these files, but code is not in them."""
    size = math.prod(shape)
    content = content_of(path, 16 + most * size)
    sides = struct.unpack_from(f">{2 + len(shape)}I", content.ljust(16, b"\0"))
    start = 4 * len(sides)
    if sides[0] != 0x801 + len(shape) or sides[2:] != shape or len(content) != start + sides[1] * size:
        what = "images of {}×{} bytes".format(*shape) if shape else "labels of a byte"
        raise NotWhole(f"{path} is not an idx file of {what}, as many as its header says")
    return np.frombuffer(content, np.uint8, offset=start).reshape(-1, *shape).copy()
