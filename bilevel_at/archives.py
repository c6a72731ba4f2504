"""Reading ``.npz`` files from anywhere: plain arrays of numbers, no larger than they say, and no code run."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from .errors import InputError, reason

__all__ = ["read_arrays"]

KINDS = "?biufU"  # bool, integers, floating point, text
MOST_INFLATED, MOST_RATIO = 2**30, 100
"""An archive that inflates to more bytes than the first, by more than the second, is a zip bomb and not data."""


def read_arrays(
    path: Path, names: Iterable[str] | None = None, opened: BinaryIO | None = None
) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` by name, without unpickling.

    Every header is held against the size of its part before anything is reserved or inflated.

    Args:
        path: the file.
        names: only these arrays, where the file has them.
        opened: the same file, opened.

    Raises:
        InputError: with a line that says why, where the file is missing, damaged, encrypted or inflates beyond measure,
            and where an array is of objects, of a record or of another type that is no number.
    """
    try:
        with zipfile.ZipFile(path if opened is None else opened) as archive:
            parts = {part.filename.removesuffix(".npy"): part for part in archive.infolist()}
            wanted = parts if names is None else [name for name in names if name in parts]
            _check_size(path, [parts[name] for name in wanted])
            return {name: _array(archive, parts[name]) for name in wanted}
    except InputError:
        raise
    except Exception as error:  # damaged archives fail in many ways, all of them inside zipfile and numpy
        raise InputError(f"{path} is not an archive of plain arrays: {reason(error)}") from None


def _check_size(path: Path, parts: list[zipfile.ZipInfo]) -> None:
    inflated, packed = sum(part.file_size for part in parts), sum(part.compress_size for part in parts)
    if inflated > max(MOST_INFLATED, MOST_RATIO * packed):
        raise InputError(f"{path} holds {packed:,} bytes that inflate to {inflated:,}; data does not")


def _array(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> np.ndarray:
    if part.flag_bits & 1:
        raise ValueError(f"{part.filename[:80]} is encrypted")
    with cast(zipfile.ZipExtFile, archive.open(part)) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{part.filename[:80]} has version {version} of the format")
        shape, column_major, kind = read(file)
        if kind.kind not in KINDS:
            what = "pickled objects, which are never loaded" if kind.hasobject else f"values of type {kind}"
            raise ValueError(f"{part.filename[:80]} holds {what}; plain numbers are wanted")
        size = math.prod(int(side) for side in shape) * kind.itemsize  # of Python's integers, which do not overflow
        if any(side < 0 for side in shape) or size != part.file_size - file.tell():
            raise ValueError(f"{part.filename[:80]} is not as large as its shape {str(shape)[:60]} says")
        content = bytearray(size)
        view, place = memoryview(content), 0
        while place < size and (count := file.readinto(view[place:])):
            place += count
        if place < size:
            raise ValueError(f"{part.filename[:80]} ends early")
    flat = np.frombuffer(content, dtype=kind)
    array = flat.reshape(shape, order="F" if column_major else "C")
    if kind.kind == "U":
        array.astype(object)  # decodes, so that text which is none is found here
    return array
