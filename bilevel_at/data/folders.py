"""Data sets that are folders of image files: Tiny-ImageNet, read into memory, and ImageNet, streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .staging import staged
from .stream import Files, Streamed, names_of

__all__ = ["imagenet", "tiny_imagenet"]


def tiny_imagenet(folder: Path, workers: int) -> dict[str, np.ndarray]:
    """``x_train``, ``y_train``, ``x_test``, ``y_test`` of tiny-imagenet-200; the test set is its ``val``.

    x: uint8 ``[N, 3, 64, 64]``. y: the position of the class among the sorted WordNet names. Raises OSError where files
    are missing, and :class:`InputError` where they are not what they should be.
    """
    from torchvision.datasets import ImageFolder

    train = ImageFolder(str(folder / "train"))
    label_of = {name: i for i, name in enumerate(train.classes)}
    annotations = folder / "val" / "val_annotations.txt"
    test = []
    for line in annotations.read_text(errors="replace").splitlines():
        file, name, *_ = [*line.split("\t"), ""]
        if name not in label_of:
            raise InputError(f"{annotations} names the class {name!r}, for which {folder / 'train'} has no folder")
        test.append((str(folder / "val" / "images" / file), label_of[name]))
    arrays = {}
    for split, samples in (("train", train.samples), ("test", test)):
        arrays[f"x_{split}"] = _decoded(folder, [path for path, _ in samples], workers)
        arrays[f"y_{split}"] = np.array([label for _, label in samples], dtype=np.int64)
    return arrays


def _decoded(root: Path, paths: list[str], workers: int, batch_size: int = 250) -> np.ndarray:
    """uint8 ``[N, 3, 64, 64]``, with a bar on a terminal."""
    from rich.console import Console  # here, because recipes import this package and must stay light
    from rich.progress import Progress

    x = np.empty((len(paths), 3, 64, 64), dtype=np.uint8)
    rows = [list(range(len(paths)))[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    batches = Files(root, names_of(root, paths), _as_it_is).batches(rows, workers)
    console = Console()
    # No thread refreshes the bar: processes are about to be forked.
    with Progress(console=console, disable=not console.is_terminal, auto_refresh=False) as progress:
        task = progress.add_task(f"reading {root.name}", total=len(paths))
        for at, batch in zip(rows, batches, strict=True):
            x[at] = batch.numpy()
            progress.update(task, advance=len(at), refresh=True)
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
        root = next((place for place in places if all((place / file).is_file() for file in _archives(place))), None)
        if root is None:
            raise FileNotFoundError
        _unpack(root)
    (train, classes), (val, val_classes) = (_class_folders(root, split, workers) for split in ("train", "val"))
    if classes != val_classes:
        one = sorted({*classes} ^ {*val_classes})[0]
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
        raise InputError(f"ImageNet's archives in {root} cannot be unpacked: {error}") from None


def _class_folders(root: Path, split: str, workers: int) -> tuple[Streamed, list[str]]:
    """The images of ``root/split``, and the classes' names."""
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(root / split))
    except OSError as error:
        raise InputError(f"{root / split} must have a folder of images for each class: {error}") from None
    names = names_of(root, [path for path, _ in folder.samples])
    y = torch.tensor([label for _, label in folder.samples])
    return Streamed(root, names, y, len(folder.classes), workers), folder.classes
