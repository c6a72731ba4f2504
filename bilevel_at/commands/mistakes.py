"""Errors that no one foresaw, in one line that names the place: a user's own code, or memory that ran out."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import ModuleType

import torch

import bilevel_at

__all__ = ["is_out_of_memory", "one_line"]

MOST = 300  # characters of a message


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this process, could not have the memory it asked for."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator raises a RuntimeError like any other.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """The error, and the file, line and function that it is from: the user's own where there is one."""
    message = " ".join(str(error).split())[:MOST]
    what = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if is_out_of_memory(error):
        what = f"out of memory; a smaller --batch-size, or --accumulate, needs less ({what})"
    return f"{what} [{_place(error)}; --traceback shows how it came to that]"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_library(Path(frame.filename))]
    within = [frame for frame in frames if _is_in(Path(frame.filename), bilevel_at)]
    for chosen in (own, within, frames):
        if chosen:
            frame = chosen[-1]
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    return "no place is known"


def _is_library(path: Path) -> bool:
    """Installed packages, Python itself, and this package with its problems and solvers."""
    installed = {"site-packages", "dist-packages"} & set(path.parts) or path.name.startswith("<")
    return bool(installed) or _is_in(path, traceback) or _is_in(path, bilevel_at)


def _is_in(path: Path, package: ModuleType) -> bool:
    folders = [Path(folder) for folder in getattr(package, "__path__", [])] or [Path(str(package.__file__)).parent]
    return any(folder.resolve() in path.resolve().parents for folder in folders)
