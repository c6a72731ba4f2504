"""Files of class folders, and images decoded from them: from anywhere, so within bounds and without running code."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..errors import InputError, printable
from .raw_files import NotWhole

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["class_files", "decoded", "names_of"]

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""What is decoded, whatever a file's name says. Pillow hands other formats to programs: EPS to Ghostscript."""
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder's
MOST_PIXELS = 89_478_485  # Pillow's own bound; 358 MB as Pillow has them, and as much again as they become RGB
LARGE = 8_000_000  # pixels; what threads have freed stays theirs, so eight threads would keep eight such images
MOST_COSTLY = 40_000_000  # pixels where Pillow takes three times that memory: all coefficients, or two canvases
MOST_ASPECT = 200  # the shorter side becomes 256, so a line of pixels would become a picture of any size


def decoded(path: str, view: Callable[[Image], Tensor], large: bool = True) -> Tensor | None:
    """What ``view`` makes of the image, as RGB; without ``large``, None where it has more than 8 million pixels.

    Raises ValueError, or one of Pillow's many errors, where it is no image, or too large.
    """
    from PIL import Image

    with open(path, "rb") as file:
        head = file.read(30)
        file.seek(0)
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":  # Pillow has its canvases as soon as it opens one
            _check_size(*_webp_size(head), MOST_COSTLY)
        image = Image.open(file, formats=FORMATS)
        width, height = image.size
        costly = "progressive" in image.info or image.mode == "CMYK"
        _check_size(width, height, MOST_COSTLY if costly else MOST_PIXELS)
        return view(image.convert("RGB")) if large or width * height <= LARGE else None


def _check_size(width: int, height: int, most: int) -> None:
    if width * height > most or max(width, height) > MOST_ASPECT * min(width, height):
        raise ValueError(f"it is {width}×{height}; at most {most:,} pixels, and sides of at most {MOST_ASPECT} to 1")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height of a WebP file's canvas, from its first 30 bytes."""
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def class_files(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """(names of the class folders in ``folder``, paths of all their images, labels), as torchvision's ImageFolder.

    Raises:
        NotWhole: where there is no class folder, or one without an image.
        InputError: where a link leads in a circle, or something named as an image is no file.
    """
    try:
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir())
        images = [_images(os.path.join(folder, name)) for name in classes]
    except OSError as error:
        where = printable(str(error.filename or folder))
        raise NotWhole(f"{where} cannot be read: {error.strerror or type(error).__name__}") from None
    if not classes:
        raise NotWhole(f"{folder} must have a folder of images for each class")
    empty = [printable(name) for name, files in zip(classes, images, strict=True) if not files]
    if empty:
        others = f", as {len(empty) - 1} others have none" if len(empty) > 1 else ""
        raise NotWhole(f"{folder} must have images ({', '.join(ENDINGS)}) in the folder {empty[0][:80]}{others}")
    labels = [label for label, files in enumerate(images) for _ in files]
    return classes, [path for files in images for path in files], labels


def _images(folder: str) -> list[str]:
    """The paths of the images in a folder and those in it, sorted as torchvision has them."""
    above = {*Path(folder).absolute().parents, *Path(folder).resolve().parents}
    seen = {_identity(parent) for parent in above}
    found, ahead = [], [folder]
    while ahead:
        root = ahead.pop()
        if (identity := _identity(root)) in seen:
            raise InputError(
                f"{printable(root)} leads to a folder that it is in or that was read before; remove the link"
            )
        seen.add(identity)
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.is_dir():
                    ahead.append(entry.path)
                elif entry.name.lower().endswith(ENDINGS):
                    if not entry.is_file():  # a link to nothing, or a pipe, which would be waited for
                        raise InputError(f"{printable(entry.path)} is no file; remove it, or put an image there")
                    found.append((root, entry.name))
    return [os.path.join(*place) for place in sorted(found)]


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def names_of(root: Path, paths: Sequence[str]) -> np.ndarray:
    """Paths under ``root``, ``[N]`` bytes with forward slashes."""
    start = len(os.path.join(root, "")) if root != Path() else 0  # "./" is not before the paths
    return np.array([os.fsencode(path[start:].replace(os.sep, "/")) for path in paths])
