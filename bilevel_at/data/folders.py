"""Data sets that are folders of image files: Tiny-ImageNet, read into memory, and ImageNet, streamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError, printable, reason, shown
from .bars import bar
from .decoding import class_files, names_of
from .raw_files import NotWhole, content_of
from .staging import staged
from .stream import Files, Streamed

__all__ = ["imagenet", "tiny_imagenet"]

MOST_ANNOTATIONS = 2**24  # bytes; the file of 10,000 lines has 2**18


def tiny_imagenet(folder: Path, workers: int) -> dict[str, np.ndarray]:
    """``x_train``, ``y_train``, ``x_test``, ``y_test`` of tiny-imagenet-200; the test set is its ``val``.

    x: uint8 ``[N, 3, 64, 64]``. y: the position of the class among the sorted WordNet names. Raises
    :class:`NotWhole` where files are missing, and :class:`InputError` where they are not what they should be.
    """
    classes, paths, labels = class_files(folder / "train")
    label_of = {name: i for i, name in enumerate(classes)}
    annotations = folder / "val" / "val_annotations.txt"
    test: dict[str, int] = {}
    for line in content_of(annotations, MOST_ANNOTATIONS).decode(errors="replace").splitlines():
        file, name, *_ = [*line.split("\t"), ""]
        if name not in label_of:
            raise InputError(f"{annotations} names the class {shown(name)}, for which {folder / 'train'} has no folder")
        path = folder / "val" / "images" / file
        if path.name != file or not os.path.isfile(path):  # a name alone, so that no other folder and no pipe is read
            raise NotWhole(f"{annotations} names {shown(file)}, which is no file in {folder / 'val' / 'images'}")
        if str(path) in test:
            raise InputError(f"{annotations} names {shown(file)} twice")
        test[str(path)] = label_of[name]
    return {
        "x_train": _decoded(folder, paths, workers),
        "y_train": np.array(labels, dtype=np.int64),
        "x_test": _decoded(folder, list(test), workers),
        "y_test": np.array(list(test.values()), dtype=np.int64),
    }


def _decoded(root: Path, paths: list[str], workers: int, batch_size: int = 250) -> np.ndarray:
    """uint8 ``[N, 3, 64, 64]``, with a bar on a terminal."""
    x = np.empty((len(paths), 3, 64, 64), dtype=np.uint8)
    rows = [list(range(len(paths)))[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    batches = Files(root, names_of(root, paths), _as_it_is).batches(rows, workers)
    with bar(f"reading {root.name}", len(paths)) as advance:
        for at, batch in zip(rows, batches, strict=True):
            x[at] = batch.numpy()
            advance(len(at))
    return x


def _as_it_is(image: Any, position: int) -> torch.Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    if image.size != (64, 64):
        raise ValueError("it is {}×{}, and Tiny-ImageNet's images are 64×64".format(*image.size))
    x: torch.Tensor = pil_to_tensor(image)
    return x


def imagenet(data_dir: Path, workers: int) -> tuple[Streamed, Streamed]:
    """(train, val) of ``data_dir/imagenet``, or of ``data_dir`` itself: folders ``train`` and ``val`` of class folders.

    Where those are not there, but ILSVRC2012's archives are, torchvision checks and unpacks them first. Raises
    FileNotFoundError where there is neither, and :class:`InputError` where the folders do not agree.
    """
    places = (data_dir / "imagenet", data_dir)
    root = next((place for place in places if _missing(place) == []), None)
    if root is None:
        root = next((place for place in places if all(os.path.isfile(place / file) for file in _archives(place))), None)
        if root is None:
            raise FileNotFoundError
        _unpack(root)
    (train, classes), (val, val_classes) = (_class_folders(root, split, workers) for split in ("train", "val"))
    if classes != val_classes:
        one = printable(sorted({*classes} ^ {*val_classes})[0])[:80]
        raise InputError(f"{root}: train and val must have the same classes, and {one} is in one of them only")
    return train, val


def _missing(root: Path) -> list[str]:
    return [split for split in ("train", "val") if not (root / split).is_dir()]


def _archives(root: Path) -> list[str]:
    """What has to be unpacked for the folders that are missing."""
    from torchvision.datasets.imagenet import ARCHIVE_META

    return [ARCHIVE_META[part][0] for part in (*_missing(root), "devkit")]


def _unpack(root: Path) -> None:
    from torchvision.datasets import ImageNet

    try:
        with staged(root, links=_archives(root)) as stage:
            for split in _missing(root):
                ImageNet(str(stage), split)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise InputError(f"ImageNet's archives in {root} cannot be unpacked: {reason(error)}") from None


def _class_folders(root: Path, split: str, workers: int) -> tuple[Streamed, list[str]]:
    """The images of ``root/split``, and the classes' names."""
    classes, paths, labels = class_files(root / split)
    return Streamed(root, names_of(root, paths), torch.tensor(labels), len(classes), workers), classes
