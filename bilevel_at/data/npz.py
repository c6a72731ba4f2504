"""Arrays of images and labels: the ``.npz`` they come from, and the checks on them before anything is computed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..archives import read_arrays
from ..errors import InputError
from .sets import Images

__all__ = ["ARRAYS", "checked", "extra_from_npz", "from_npz"]

MAX_CLASSES = 1_000_000  # a label beyond it is a mistake, and would ask for that many outputs
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
GENERATED = ("image", "label")  # what published files of generated images call theirs


def from_npz(path: Path) -> tuple[Images, Images]:
    """(training set, test set) of an ``.npz`` with :data:`ARRAYS`; pickled arrays are refused.

    Raises :class:`InputError` where the file cannot be read or :func:`checked` finds a mistake.
    """
    if not path.is_file():
        raise InputError(f"data file {path} does not exist; --data takes a known name or an .npz file")
    return checked(str(path), _arrays(path, ARRAYS))


def extra_from_npz(path: Path, like: Images) -> Images:
    """More training images of the same shape and classes as ``like``: ``x_train`` and ``y_train`` of an ``.npz``, or
    ``image`` and ``label``, as published files of generated images have it.

    Raises:
        InputError: where the file cannot be read, or its images or labels do not fit.
    """
    if not path.is_file():
        raise InputError(f"--extra {path} does not exist; it is an .npz with x_train and y_train, or image and label")
    arrays = _arrays(path, ARRAYS[:2], GENERATED)
    names = tuple(arrays)
    y = arrays[names[1]]
    _check_labels(f"--extra {path}", arrays, *names)
    pixels = _pixels(f"--extra {path}", arrays, names[0])
    if pixels.shape[1:] != like.shape:
        raise InputError(
            f"--extra {path} has images of {tuple(pixels.shape[1:])}; the training images are {like.shape}"
        )
    if y.max() >= like.classes:
        raise InputError(f"--extra {path} has the label {y.max()}; the training set has labels 0 … {like.classes - 1}")
    if pixels.dtype != like.x.dtype:
        raise InputError(f"--extra {path} has {pixels.dtype} images; the training images are {like.x.dtype}")
    return Images(pixels, torch.from_numpy(y.astype(np.int64)), like.classes)


def _arrays(path: Path, *choices: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of the first choice of names that the file has; pickled ones are refused."""
    needs = " or ".join(", ".join(names) for names in choices)
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            single = file.read(6) == b"\x93NUMPY"
        if single:
            raise InputError(f"{path} is a single array; an .npz with {needs} is needed")
        raise InputError(f"{path} is not an .npz file, which is a zip archive of arrays")
    arrays = read_arrays(path, [name for names in choices for name in names])
    chosen = next((names for names in choices if set(names) <= set(arrays)), choices[0])
    missing = [key for key in chosen if key not in arrays]
    if missing:
        raise InputError(f"{path} has no array {', '.join(missing)}; it needs {needs}")
    return {key: arrays[key] for key in chosen}


def checked(where: str, arrays: dict[str, np.ndarray]) -> tuple[Images, Images]:
    """(training set, test set) of :data:`ARRAYS`; ``where`` they come from begins each message.

    x: NHWC or NCHW (or NHW), uint8, or floating point in [0, 1]; a second axis of 1 or 3 is read as the channels.
    y: vectors of integers. Raises :class:`InputError` where they are something else, do not agree, or are too few.
    """
    classes = 0
    for split in ("train", "test"):
        classes = max(classes, _check_labels(where, arrays, f"x_{split}", f"y_{split}"))
    if classes > MAX_CLASSES:
        raise InputError(
            f"{where}: there is a label {classes - 1}; labels are 0 … classes − 1, and below {MAX_CLASSES}"
        )
    n = len(arrays["x_train"])
    if n < 20:
        raise InputError(f"{where}: x_train has {n} images; at least 20 are needed, a tenth of which is held out")
    if classes < 2:
        raise InputError(f"{where}: y_train has one class only; at least 2 are needed")
    train, test = (
        Images(_pixels(where, arrays, f"x_{split}"), torch.from_numpy(arrays[f"y_{split}"].astype(np.int64)), classes)
        for split in ("train", "test")
    )
    if train.shape != test.shape:
        raise InputError(f"{where}: training images are {train.shape} and test images {test.shape}; they must agree")
    return train, test


def _check_labels(where: str, arrays: dict[str, np.ndarray], images: str, labels: str) -> int:
    """The number of classes in the labels of that name, or an InputError."""
    x, y = arrays[images], arrays[labels]
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"{where}: {labels} is {y.dtype} of shape {y.shape}; labels are a vector of integers")
    if x.ndim == 0:
        raise InputError(f"{where}: {images} is a single value; images are NHWC or NCHW")
    if len(x) != len(y) or len(y) == 0:
        raise InputError(
            f"{where}: {images} has {len(x)} images and {labels} {len(y)} labels; they must agree, and be some"
        )
    if y.min() < 0:
        raise InputError(f"{where}: {labels} has the label {y.min()}; labels are 0 … classes − 1")
    if labels == "y_test" and y.max() > arrays["y_train"].max():
        raise InputError(
            f"{where}: y_test has the label {y.max()}, which y_train (0 … {arrays['y_train'].max()}) does not have"
        )
    return int(y.max()) + 1


def _pixels(where: str, arrays: dict[str, np.ndarray], name: str) -> Tensor:
    x = arrays[name]
    if x.size == 0:
        raise InputError(f"{where}: {name} has shape {x.shape}, which holds no pixel")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InputError(f"{where}: {name} has shape {x.shape}; images are NHWC or NCHW with 1 or 3 channels, or NHW")
    if x.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(x))
    if not np.issubdtype(x.dtype, np.floating):
        raise InputError(f"{where}: {name} is {x.dtype}; images are uint8, or floating point in [0, 1]")
    if np.isnan(x).any():
        raise InputError(f"{where}: {name} has NaN values; images are uint8, or floating point in [0, 1]")
    if x.min() < 0 or x.max() > 1:
        raise InputError(
            f"{where}: {name} has values from {x.min():g} to {x.max():g}; floating point images lie in [0, 1]"
        )
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
