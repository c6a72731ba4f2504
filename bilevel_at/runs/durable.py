"""Files that are whole or not there: written beside their place, flushed to the disk, then moved."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BilevelError

__all__ = ["Written", "sha256_of", "step_back", "sync_folder", "whole_copy", "write_beside", "writing"]

CHUNK = 1 << 20


class Written:
    """A binary file to write to, which computes the SHA-256 of what passes.

    An error of the operating system is kept, and raised by :meth:`close`: torch's zip writer is C++, and an exception
    in one of its writes comes out as another one that has lost the reason.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                self._file.write(data)
                self._digest.update(data)
            except OSError as error:
                self._error = error
        return memoryview(data).nbytes

    def read(self, size: int = -1) -> bytes:
        """numpy asks for this method before it takes an object for a file."""
        raise OSError("this file is only written to")

    def flush(self) -> None:
        """Nothing to do before :meth:`close`."""

    def close(self) -> str:
        """Flush to the disk, and return the SHA-256."""
        if self._error is not None:
            raise self._error
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into one line that names the file and the reason."""
    try:
        yield
    except OSError as error:
        raise BilevelError(
            f"{path} cannot be written: {error.strerror or error}; what was written before it is kept"
        ) from None


def write_beside(path: Path, write: Callable[[Any], object]) -> tuple[Path, str]:
    """Write a file under a temporary name in the folder of ``path``, and flush it to the disk.

    Args:
        path: where the file will be.
        write: writes the content to the object that it gets, which has ``write(bytes)``.

    Returns:
        The temporary path, and the SHA-256 of the content.

    Raises:
        BilevelError: if it cannot be written; nothing is left of it then.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            partial.unlink(missing_ok=True)  # do not write through a symbolic link
            with open(partial, "xb") as file:
                written = Written(file)
                write(written)
                return partial, written.close()
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def whole_copy(source: Path, path: Path, sha256: str) -> bool:
    """Copy a file if its content has this SHA-256. Returns whether it had."""
    try:
        with open(source, "rb") as file:
            partial, copied = write_beside(path, lambda out: [out.write(part) for part in _parts(file)])
    except OSError:
        return False
    if copied != sha256:
        partial.unlink()
        return False
    with writing(path):
        os.replace(partial, path)
    return True


def step_back(path: Path, to: Path) -> None:
    """Give the file at ``path`` the name ``to`` as well, so that ``path`` is there until something replaces it."""
    extra = to.with_name(f".{to.name}.partial")
    try:
        extra.unlink(missing_ok=True)
        os.link(path, extra)
    except OSError:  # not every file system has hard links
        os.replace(path, to)
    else:
        os.replace(extra, to)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk, so that files that were moved there stay after a loss of power."""
    if os.name == "nt":  # which cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(file: BinaryIO) -> str:
    """The SHA-256 of an open file, which is at its beginning afterwards."""
    digest = hashlib.sha256()
    for part in _parts(file):
        digest.update(part)
    file.seek(0)
    return digest.hexdigest()


def _parts(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while part := file.read(CHUNK):
        yield part
