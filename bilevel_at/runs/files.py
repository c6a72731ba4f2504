"""The files of a directory: written together or not at all, and compared with its manifest when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..archives import read_arrays
from ..errors import InputError, reason
from .durable import sha256_of, writing
from .manifest import ABSENT, Manifest, tell
from .saving import Saving

__all__ = ["Files", "plain"]


def _type_name(value: Any) -> str:
    """The name of an object's type, written to JSON in place of a repr, whose address differs in every run."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def plain(value: Any) -> Any:
    """The value after a round trip through JSON."""
    return json.loads(json.dumps(value, default=_type_name))


class Files:
    """A directory whose files are replaced atomically: an interruption leaves either the old version or the new one.

    Args:
        path: the directory; if it does not exist, it is made when the first file is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._there = self.path.is_dir()  # a directory that vanishes later is not made again
        self._saving: Saving | None = None

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is written within becomes one change: after an interruption either all of it or nothing is there."""
        if self._saving is not None:
            yield
            return
        self._make()
        saving = self._saving = Saving(self.path)
        try:
            yield
            with writing(self.path):  # what is read on the way too: the manifest, files that it does not list yet
                saving.commit()
        finally:
            self._saving = None
            saving.discard()

    def write(self, name: str, write: Any) -> None:
        """Replace a file.

        Args:
            name: its path in the directory.
            write: writes the content to the object that it gets, which has ``write(bytes)``.

        Raises:
            InputError: if its folder is a link that leads out of the directory.
            BilevelError: if it cannot be written; then nothing of it is left.
        """
        if self._saving is None:
            with self.together():
                self.write(name, write)
            return
        folder = (self.path / name).parent
        if folder != self.path:
            if self.path.resolve() not in folder.resolve().parents:
                raise InputError(f"{folder} leads out of {self}; a run's files are its own")
            with writing(self.path / name):
                self._within(folder)
        self._saving.stage(name, write)

    def _make(self) -> None:
        if not self._there:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self._there = True

    def _within(self, folder: Path) -> None:
        """Make a folder in the directory, but not the directory."""
        for part in [*reversed(folder.relative_to(self.path).parents), folder.relative_to(self.path)][1:]:
            (self.path / part).mkdir(exist_ok=True)

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file of the run, whose content the manifest lists; that of the generation before, with a warning, if not.

        Raises:
            InputError: if the file is missing, or damaged and there is no other.
        """
        path = self.path / name
        try:
            file = self._opened(name)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
        with file:
            yield file

    def _opened(self, name: str) -> BinaryIO:
        path, manifest = self.path / name, Manifest.read(self.path)
        while manifest is not None:
            if (file := _listed(manifest, name)) is not None:
                return file
            known, manifest = manifest, Manifest.read(self.path)
            if manifest == known:  # otherwise a command is replacing files
                if not path.exists():
                    raise InputError(f"{path} is missing")
                why = "its SHA-256 is not the one in" if known.allowed(name) else "it is not listed in"
                raise InputError(
                    f"{path} is damaged or of another run: {why} manifest.json; if you changed it yourself, delete "
                    "manifest.json and manifest-before.json, and all files are read unchecked"
                )
        return path.open("rb")

    def has(self, name: str) -> bool:
        """Whether a file is there. One that was there is missed with a warning."""
        if (self.path / name).is_file():
            return True
        manifest = Manifest.read(self.path)
        allowed = [] if manifest is None else manifest.allowed(name)
        if allowed and ABSENT not in allowed:
            tell(f"{self.path / name} is missing, although manifest.json lists it")
        return False

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, default=_type_name) + "\n"
        self.write(name, lambda file: file.write(text.encode()))

    def read_json(self, name: str) -> Any:
        """The content of a JSON file.

        Args:
            name: the file's name in the directory.

        Raises:
            InputError: if the file is missing, damaged, or not JSON.
        """
        if not (self.path / name).is_file():
            raise InputError(f"{self.path} has no {name}; a run directory of bilevel_at.run does")
        with self.open(name) as file:
            try:
                return json.loads(file.read().decode())
            except (ValueError, RecursionError, MemoryError) as error:  # not JSON, not text, or nested too deeply
                raise InputError(f"{self.path / name} is not JSON: {reason(error)}") from None

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        self.write(name, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]  # numpy's is too narrow

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of an ``.npz`` file by name, without unpickling.

        Args:
            name: the file's name in the directory.

        Returns:
            An empty dictionary if the file is missing or, with a warning, if it is damaged.
        """
        if not self.has(name):
            return {}
        try:
            return self.read_arrays(name)
        except InputError as error:
            tell(f"{self.path / name} is left out: {error}")
            return {}

    def read_arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of an ``.npz`` file by name, without unpickling.

        Raises:
            InputError: if the file is missing or damaged.
        """
        with self.open(name) as file:
            return read_arrays(self.path / name, opened=file)


def _listed(manifest: Manifest, name: str) -> BinaryIO | None:
    """The opened file of a name, with a content that the manifest lists; None if there is none."""
    allowed = manifest.allowed(name)
    for number, place in enumerate(manifest.places(name) if allowed else ()):
        if not place.is_file():
            continue
        file = place.open("rb")
        if sha256_of(file) in allowed:
            if number:
                tell(f"{manifest.folder / name} is damaged or missing; {place.name} is read, of the generation before")
            return file
        file.close()
    return None
