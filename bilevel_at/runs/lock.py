"""One command at a time writes into a run directory: an advisory lock, which a dead process does not keep."""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import InputError
from .durable import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked"]

FILE = ".lock"
_OPEN: set[IO[str]] = set()  # the files of the locks that this process holds


def _leave_to_the_parent() -> None:
    """Close them in a forked process: workers that load data may outlive their parent, and would keep its locks."""
    while _OPEN:
        _OPEN.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


@contextmanager
def locked(folder: Path, command: str) -> Iterator[None]:
    """Hold the lock of a run directory, which is made if it does not exist, and is gone again if it stays empty.

    Args:
        folder: the directory.
        command: the name of the command, for whoever comes second.

    Raises:
        InputError: if another process holds it; the message says which one.
        BilevelError: if the directory cannot be written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with writing(folder / FILE):
            file = _locked(folder / FILE)
        if file is None:
            raise InputError(
                f"{folder} is in use by {_holder(folder / FILE)}; wait for it, or choose another directory"
            )
        _OPEN.add(file)
        try:
            now = datetime.datetime.now().isoformat(" ", "seconds")
            about = {"host": socket.gethostname(), "pid": os.getpid(), "command": command, "since": now}
            with writing(folder / FILE):
                file.write(json.dumps(about))
                file.flush()
            yield
        finally:
            with suppress(OSError):  # the directory may have vanished
                (folder / FILE).unlink()
            _OPEN.discard(file)
            file.close()
    finally:
        for path in made:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def _locked(path: Path) -> IO[str] | None:
    """The lock's file, open and locked and empty; None if another process holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        file = os.fdopen(handle, "r+")
        if fcntl is None:
            return file  # without flock there is no lock; docs/reliability.md says so
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:  # a file system without locks, as some network ones are
            return file
        # Whoever held it may have deleted the file after it was opened here; then the lock is of no file.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                file.truncate(0)
                return file
        file.close()


def _holder(path: Path) -> str:
    try:
        with path.open() as file:
            about = json.loads(file.read(1000))
        return f"{about['command']} (process {about['pid']} on {about['host']}, since {about['since']})"
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return "another process"
