"""Where images come from, and the checks on them before anything is computed."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["DATA_NAMES", "Images", "load_data"]

DATA_NAMES = {
    "digits": "1,797 handwritten digits, 8×8, 10 classes, embedded in scikit-learn",
    "fashion_mnist": "70,000 images of clothing, 28×28, 10 classes",
    "cifar10": "60,000 colour images, 32×32, 10 classes",
    "cifar100": "60,000 colour images, 32×32, 100 classes",
    "svhn": "99,289 street-view digits, 32×32, 10 classes",
    "tiny_imagenet": "110,000 colour images, 64×64, 200 classes",
    "imagenet": "1.3 million colour images, 1,000 classes",
}

MAX_CLASSES = 1_000_000  # a label beyond it is a mistake, and would ask for that many outputs
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Images:
    """A labelled image set: ``x [N, C, H, W]`` uint8 in 0 … 255 or float32 in [0, 1], ``y [N]`` int64."""

    x: Tensor
    y: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor | slice) -> Images:
        return Images(self.x[rows], self.y[rows], self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        c, h, w = self.x.shape[1:]
        return c, h, w

    def pixels(self) -> Tensor:
        """x as float32 in [0, 1]."""
        return self.x.float() / 255 if self.x.dtype == torch.uint8 else self.x

    def sha256(self) -> str:
        """A fingerprint of the pixels and labels."""
        digest = hashlib.sha256()
        for part in (self.x, self.y):
            digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Images:
        return Images(self.x.to(device), self.y.to(device), self.classes)

    def sample(self, n: int, seed: int = 0) -> Images:
        """``n`` random examples, or all where there are fewer; the same ones for the same seed."""
        return self[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n]]

    def split(self, fraction: float, seed: int = 0) -> tuple[Images, Images]:
        """(the rest, a random ``fraction`` held out); the same split for the same seed."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held = max(1, round(fraction * len(self)))
        return self[order[held:]], self[order[:held]]


def load_data(name: str, data_dir: str | Path = "data") -> tuple[Images, Images]:
    """(training set, test set) of a known name or of an ``.npz`` file.

    A known name is looked for as ``data_dir/NAME.npz``; the digits need no file. An ``.npz`` holds ``x_train``,
    ``y_train``, ``x_test``, ``y_test``: images NHWC or NCHW (or NHW), uint8, or floating point in [0, 1]; a second axis
    of 1 or 3 is read as the channels. Pickled arrays are refused.

    Raises :class:`InputError`, saying what to put where.
    """
    if name.endswith(".npz"):
        return _from_npz(Path(name))
    if name == "digits":
        return _digits()
    if name not in DATA_NAMES:
        raise InputError(
            f"data {name!r} is not known; choose from {', '.join(DATA_NAMES)}, or give the path of an .npz file"
        )
    path = Path(data_dir) / f"{name}.npz"
    if not path.exists():
        raise InputError(
            f"data set {name} is not there: put {path.name} (arrays {', '.join(ARRAYS)}) into {Path(data_dir)}/, "
            "or name its folder with --data-dir"
        )
    return _from_npz(path)


def _digits() -> tuple[Images, Images]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=360, random_state=0, stratify=y)

    def images(values: np.ndarray, labels: np.ndarray) -> Images:
        pixels = torch.from_numpy(values / 16).float().reshape(-1, 1, 8, 8)
        return Images(pixels, torch.from_numpy(labels).long(), 10)

    return images(x_train, y_train), images(x_test, y_test)


def _from_npz(path: Path) -> tuple[Images, Images]:
    if not path.is_file():
        raise InputError(f"data file {path} does not exist; --data takes a known name or an .npz file")
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise InputError(f"{path} is a single array; an .npz with {', '.join(ARRAYS)} is needed")
        with archive:
            missing = [key for key in ARRAYS if key not in archive.files]
            if missing:
                raise InputError(f"{path} has no array {', '.join(missing)}; it needs {', '.join(ARRAYS)}")
            arrays = {key: archive[key] for key in ARRAYS}
    except ValueError as error:
        if "pickle" in str(error):
            raise InputError(f"{path} holds pickled objects, which are never loaded; save plain uint8 arrays") from None
        raise InputError(f"{path} cannot be read: {error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise InputError(f"{path} is not an .npz file that can be read: {error}") from None

    classes = 0
    for split in ("train", "test"):
        classes = max(classes, _check_labels(path, arrays, split))
    if classes > MAX_CLASSES:
        raise InputError(f"{path}: there is a label {classes - 1}; labels are 0 … classes − 1, and below {MAX_CLASSES}")
    n = len(arrays["x_train"])
    if n < 20:
        raise InputError(f"{path}: x_train has {n} images; at least 20 are needed, a tenth of which is held out")
    if classes < 2:
        raise InputError(f"{path}: y_train has one class only; at least 2 are needed")
    train, test = (
        Images(_pixels(path, arrays, split), torch.from_numpy(arrays[f"y_{split}"].astype(np.int64)), classes)
        for split in ("train", "test")
    )
    if train.shape != test.shape:
        raise InputError(f"{path}: training images are {train.shape} and test images {test.shape}; they must agree")
    return train, test


def _check_labels(path: Path, arrays: dict[str, np.ndarray], split: str) -> int:
    """The number of classes in this split, or an InputError."""
    x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"{path}: y_{split} is {y.dtype} of shape {y.shape}; labels are a vector of integers")
    if x.ndim == 0:
        raise InputError(f"{path}: x_{split} is a single value; images are NHWC or NCHW")
    if len(x) != len(y) or len(y) == 0:
        raise InputError(
            f"{path}: x_{split} has {len(x)} images and y_{split} {len(y)} labels; they must agree, and be some"
        )
    if y.min() < 0:
        raise InputError(f"{path}: y_{split} has the label {y.min()}; labels are 0 … classes − 1")
    if split == "test" and y.max() > arrays["y_train"].max():
        raise InputError(
            f"{path}: y_test has the label {y.max()}, which y_train (0 … {arrays['y_train'].max()}) does not have"
        )
    return int(y.max()) + 1


def _pixels(path: Path, arrays: dict[str, np.ndarray], split: str) -> Tensor:
    name, x = f"x_{split}", arrays[f"x_{split}"]
    if x.size == 0:
        raise InputError(f"{path}: {name} has shape {x.shape}, which holds no pixel")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InputError(f"{path}: {name} has shape {x.shape}; images are NHWC or NCHW with 1 or 3 channels, or NHW")
    if x.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(x))
    if not np.issubdtype(x.dtype, np.floating):
        raise InputError(f"{path}: {name} is {x.dtype}; images are uint8, or floating point in [0, 1]")
    if np.isnan(x).any():
        raise InputError(f"{path}: {name} has NaN values; images are uint8, or floating point in [0, 1]")
    if x.min() < 0 or x.max() > 1:
        raise InputError(
            f"{path}: {name} has values from {x.min():g} to {x.max():g}; floating point images lie in [0, 1]"
        )
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
