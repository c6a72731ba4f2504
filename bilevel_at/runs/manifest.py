"""``manifest.json``: the SHA-256 of every file of a run that is read again, and the last two generations.

A generation is what training goes on from: the checkpoints, the memories, the metrics and the history of one moment.
``NAME-before`` is the file of the generation before. The manifest is written ahead of the files: while they are
replaced it lists the old content and the new one, so that a process that dies in between leaves files that it lists.

Without a manifest, as in runs of earlier versions, files are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from .durable import sha256_of, step_back, sync_folder, write_beside, writing

__all__ = ["ABSENT", "CONFIG", "DamageWarning", "Manifest", "before", "is_generational", "is_memory", "tell"]

CONFIG = "config.json"
FILE = "manifest.json"
FORMAT = 1
ABSENT = ""  # in place of the SHA-256 of a file that is written for the first time
GENERATIONAL = ("last.pt", "midway.pt", "best.pt", "last_good.pt", "metrics.jsonl", "history.npz")


class DamageWarning(UserWarning):
    """A file of a run is damaged or missing, and another one is read in its place."""


def tell(message: str) -> None:
    """Warn of damage; commands print the message in one line."""
    warnings.warn(message, DamageWarning, stacklevel=3)


def is_memory(name: str, checkpoint: str = "") -> bool:
    """Whether a file has what policies remember; of one checkpoint, ``last.pt``, if it is named."""
    owner = checkpoint.removesuffix(".pt") + "-" if checkpoint else ""
    return name.startswith(f"memory-{owner}") and name.endswith(".pt")


def is_generational(name: str) -> bool:
    """Whether a file belongs to a generation."""
    return name in GENERATIONAL or is_memory(name)


def before(name: str) -> str:
    """``last-before.pt`` for ``last.pt``: the file of the generation before."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-before.{suffix}"


@dataclass
class Manifest:
    """What the files of a run may contain.

    folder: the run's directory.
    files: name -> the SHA-256 that the file may have; two while it is replaced, of which :data:`ABSENT` may be one.
    generations: name -> SHA-256, the newest first.
    """

    folder: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    generations: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a directory; None if it has none. A damaged one is replaced by the one before it.

        Raises:
            InputError: if both are damaged.
        """
        places = [folder / FILE, folder / before(FILE)]
        if not any(place.is_file() for place in places):
            return None
        for place in places:
            manifest = cls._parse(place)
            if manifest is not None:
                if place.name != FILE:
                    tell(
                        f"{folder / FILE} is missing or damaged; {place.name}, written just before it, is read instead"
                    )
                return manifest
        raise InputError(
            f"{folder / FILE} is damaged, and so is {before(FILE)}; delete both to read the run's files unchecked"
        )

    @classmethod
    def of_present_files(cls, folder: Path) -> Manifest:
        """A manifest that lists the files of a run of an earlier version as they are."""
        paths = [*folder.glob("*.json"), *folder.glob("evaluation/*.json"), *folder.glob("evaluation/*/*.npz")]
        files = {p.relative_to(folder).as_posix(): [_sha256(p)] for p in paths if p.is_file()}
        present = {name: _sha256(folder / name) for name in GENERATIONAL if (folder / name).is_file()}
        return cls(folder, files, [present])

    @classmethod
    def _parse(cls, place: Path) -> Manifest | None:
        try:
            content = json.loads(place.read_bytes())
            files, generations = content["files"], content["generations"]
            if content["sha256"] != _digest(files, generations) or content["format"] != FORMAT:
                return None
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            return None
        well_formed = isinstance(files, dict) and isinstance(generations, list)
        well_formed = well_formed and all(isinstance(hashes, list) for hashes in files.values())
        return cls(place.parent, files, generations) if well_formed and all(map(_names, generations)) else None

    def write(self) -> None:
        """Write the manifest; the present one, if it is whole, becomes the one before."""
        content = {"format": FORMAT, "files": self.files, "generations": self.generations}
        text = json.dumps({**content, "sha256": _digest(self.files, self.generations)}, indent=1) + "\n"
        place = self.folder / FILE
        partial, _ = write_beside(place, lambda file: file.write(text.encode()))
        with writing(place):
            if self._parse(place) is not None:
                step_back(place, place.with_name(before(FILE)))
            os.replace(partial, place)
            sync_folder(self.folder)

    def allowed(self, name: str) -> list[str]:
        """The SHA-256 that a file may have; none if it is not listed."""
        if is_generational(name):
            return [generation[name] for generation in self.generations if name in generation]
        return self.files.get(name, [])

    def places(self, name: str) -> Iterator[Path]:
        """Where the content of a name may be: in its place, or in that of the generation before."""
        yield self.folder / name
        if name in GENERATIONAL:
            yield self.folder / before(name)

    def contents(self) -> dict[tuple[str, str], Path]:
        """(name, SHA-256) -> the path, for what is there of every generation."""
        present: dict[tuple[str, str], Path] = {}
        for name in dict.fromkeys(name for generation in self.generations for name in generation):
            for place in self.places(name):
                if place.is_file():
                    present.setdefault((name, _sha256(place)), place)
        return present


def _names(generation: Any) -> bool:
    return isinstance(generation, dict) and all(
        is_generational(name) and "/" not in name and "\\" not in name and isinstance(sha256, str)
        for name, sha256 in generation.items()
    )


def _digest(files: Any, generations: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, files, generations], sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return sha256_of(file)
