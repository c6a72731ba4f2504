"""Files that appear in a folder all at once, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["staged"]


@contextlib.contextmanager
def staged(folder: Path, links: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder whose contents move into ``folder``, made if need be, when the block ends without an error.

    ``links`` are files of ``folder`` that can be read there too; they stay where they are.
    """
    folder = folder.absolute()
    beside = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    # On the same file system, so that moving is renaming; in the folder itself where it exists, which is surely ours.
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=beside) as name:
        stage = Path(name) / "files"
        stage.mkdir()
        for link in links:
            (stage / link).parent.mkdir(parents=True, exist_ok=True)
            (stage / link).symlink_to(folder / link)
        yield stage
        for link in links:
            (stage / link).unlink()
        folder.mkdir(parents=True, exist_ok=True)
        _move(stage, folder)


def _move(source: Path, target: Path) -> None:
    """Rename what is in ``source`` into ``target``; folders that are in both are merged, files replaced."""
    for entry in source.iterdir():
        there = target / entry.name
        if entry.is_dir() and there.is_dir():
            _move(entry, there)
        else:
            os.replace(entry, there)
