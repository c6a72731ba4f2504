"""Files of a run that change together: all are written beside their places, listed in the manifest, then moved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError
from .durable import step_back, sync_folder, whole_copy, write_beside, writing
from .manifest import ABSENT, CONFIG, GENERATIONAL, Manifest, before, is_generational, is_memory

__all__ = ["Saving", "restore"]

GENERATIONS = 2  # that are kept
LAST, MIDWAY = "last.pt", "midway.pt"


class Saving:
    """The changes of a directory's files, none of which is made before :meth:`commit`.

    Args:
        folder: the directory, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._staged: dict[str, tuple[Path, str]] = {}  # name -> where its content is, and the SHA-256
        self._removed: set[str] = set()
        self._memories: set[str] = set()  # of the new checkpoints

    def stage(self, name: str, write: Callable[[Any], object]) -> None:
        """Write the new content of a file beside its place."""
        self._staged[name] = write_beside(self.folder / name, write)

    def remove(self, name: str) -> None:
        """Delete a file."""
        self._removed.add(name)

    def keep_memory(self, name: str, write: Callable[[Any], object]) -> None:
        """Write a file of memories, unless the newest generation has it."""
        manifest = Manifest.read(self.folder)
        self._memories.add(name)
        current = manifest.generations[0] if manifest is not None and manifest.generations else {}
        if name not in current or not (self.folder / name).is_file():
            self.stage(name, write)

    def discard(self) -> None:
        """Delete what was written beside the places."""
        for partial, _ in self._staged.values():
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def commit(self) -> None:
        """Make the changes. A process that dies in between leaves files that the manifest lists.

        Raises:
            BilevelError: if a file cannot be moved to its place.
        """
        manifest = Manifest.read(self.folder)
        if manifest is None and (CONFIG in self._staged or any(map(is_generational, self._staged))):
            manifest = Manifest.of_present_files(self.folder)
        if manifest is None:  # a directory without a manifest stays one
            self._move_all()
            return
        advances = any(map(is_generational, self._staged))
        for number, generation in enumerate(manifest.generations):
            manifest.generations[number] = {
                name: sha256
                for name, sha256 in generation.items()
                if not any(name == gone or is_memory(name, gone) for gone in self._removed)
            }
        if advances:
            manifest.generations = [self._next(manifest), *manifest.generations[:GENERATIONS]]
        others = {name: sha256 for name, (_, sha256) in self._staged.items() if not is_generational(name)}
        manifest.files |= {name: [*manifest.files.get(name, [ABSENT]), sha256] for name, sha256 in others.items()}
        manifest.write()
        for name in GENERATIONAL if advances else ():
            self._step_back(manifest, name)
        self._move_all()
        manifest.generations = manifest.generations[:GENERATIONS]
        manifest.files |= {name: [sha256] for name, sha256 in others.items()}
        manifest.write()
        delete_unlisted(manifest)

    def _next(self, manifest: Manifest) -> dict[str, str]:
        """The new generation: the newest one with what is staged."""
        current = manifest.generations[0] if manifest.generations else {}
        staged = {name: sha256 for name, (_, sha256) in self._staged.items() if is_generational(name)}
        kept = {
            name: sha256
            for name, sha256 in current.items()
            if name in self._memories or not any(is_memory(name, checkpoint) for checkpoint in staged)
        }
        return {**kept, **staged}

    def _step_back(self, manifest: Manifest, name: str) -> None:
        """Keep the newest generation's file as that of the generation before; as a second copy if it stays as it is."""
        nothing: dict[str, str] = {}
        new, current, previous = [*manifest.generations, nothing, nothing][:3]
        place, back = self.folder / name, self.folder / before(name)
        if name not in current:
            return
        if name in self._staged:
            if place.is_file():
                with writing(back):
                    step_back(place, back)
        elif new.get(name) == current[name] != previous.get(name):
            whole_copy(place, back, current[name])

    def _move_all(self) -> None:
        for name, (partial, _) in self._staged.items():
            with writing(self.folder / name):
                os.replace(partial, self.folder / name)
        with writing(self.folder):
            for name in self._removed:
                (self.folder / name).unlink(missing_ok=True)
                (self.folder / before(name)).unlink(missing_ok=True)
            for folder in {folder for name in [*self._staged, *self._removed] for folder in Path(name).parents}:
                sync_folder(self.folder / folder)


def delete_unlisted(manifest: Manifest) -> None:
    """Delete memories and files of a generation before that no kept generation refers to."""
    kept = {name for generation in manifest.generations for name in generation}
    older = {name for generation in manifest.generations[1:] for name in generation}
    stale = [path for path in manifest.folder.glob("memory-*.pt") if path.name not in kept]
    stale += [manifest.folder / before(name) for name in GENERATIONAL if name not in older]
    for path in stale:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def restore(manifest: Manifest) -> str:
    """Go back to the newest generation that is whole, and put its files in their places.

    Returns:
        What was wrong, for a message; empty if nothing was.

    Raises:
        InputError: if no generation is whole; then nothing is changed.
    """
    folder, listed = manifest.folder, manifest.generations
    generations: Sequence[dict[str, str]] = listed
    present = manifest.contents()
    names = dict.fromkeys(name for generation in generations for name in generation)
    damaged = [name for name in names if not _in_place(name, manifest, present)]
    whole = _whole(generations, present)
    if True not in whole:
        generations = [_without_memories_of_last(generation) for generation in generations]
        whole = _whole(generations, present)
    if True not in whole or _lost_all(generations[whole.index(True)], listed, folder):
        raise InputError(
            f"{folder} has no whole generation of files to go on from: {', '.join(damaged)} damaged or missing, and "
            f"also in the generation before ({folder / 'manifest.json'} has their SHA-256)"
        )
    number = whole.index(True)
    chosen = generations[number]
    for name, sha256 in chosen.items():
        if present[name, sha256].name != name:
            whole_copy(present[name, sha256], folder / name, sha256)
    # Where the generation before is not whole, it is dropped, and the next save makes second copies of everything.
    manifest.generations = list(generations[:2]) if number == 0 and all(whole[:2]) else [chosen]
    if manifest.generations != listed:
        manifest.write()
    for name in set(GENERATIONAL) & (names.keys() - chosen.keys()):
        (folder / name).unlink(missing_ok=True)
    delete_unlisted(manifest)
    for partial in folder.rglob(".*.partial"):
        partial.unlink(missing_ok=True)
    if number:
        what = f"{', '.join(damaged)} damaged or missing" if damaged else "the last save was not finished"
        return f"{folder}: {what}; this run goes on from the generation of files before"
    if generations != listed:
        return f"{folder}: {', '.join(damaged)} damaged or missing; {MIDWAY} is newer, and goes on without"
    return _of_the_newest(folder, generations, present)


def _lost_all(chosen: Mapping[str, str], listed: Sequence[Mapping[str, str]], folder: Path) -> bool:
    """Whether only the state before the first epoch is whole, though that epoch was saved: a save that was not finished
    leaves files that are not in their places yet, and files that are lost do not."""
    saved = any(not is_memory(name) and name != MIDWAY for name in listed[0]) if listed else False
    return not chosen and saved and not any(folder.rglob(".*.partial"))


def _whole(generations: Sequence[Mapping[str, str]], present: Mapping[tuple[str, str], Path]) -> list[bool]:
    return [all(item in present for item in generation.items()) for generation in generations]


def _without_memories_of_last(generation: Mapping[str, str]) -> dict[str, str]:
    """What is needed to go on from ``midway.pt``, which has memories of its own; those of ``last.pt`` have no copy."""
    dropped = LAST if MIDWAY in generation else None
    return {n: s for n, s in generation.items() if dropped is None or not is_memory(n, dropped)}


def _of_the_newest(
    folder: Path, generations: Sequence[Mapping[str, str]], present: Mapping[tuple[str, str], Path]
) -> str:
    """What was wrong where the newest generation is whole: files that had to be copied, and those of the one before."""
    newest, older = [*generations, {}][:2]
    restored = [name for name, sha256 in newest.items() if present[name, sha256].name != name]
    lost = [
        name if is_memory(name) else before(name) for name, sha256 in older.items() if (name, sha256) not in present
    ]
    notes = []
    if restored:
        notes.append(f"{', '.join(restored)} damaged or missing; restored from {', '.join(map(before, restored))}")
    if lost:
        notes.append(f"{', '.join(lost)}, of the generation before, damaged or missing; the next save makes one")
    return f"{folder}: {'; '.join(notes)}" if notes else ""


def _in_place(name: str, manifest: Manifest, present: Mapping[tuple[str, str], Path]) -> bool:
    """Whether a file is one that a generation lists, or none that all of them list."""
    if any(present.get((name, sha256)) == manifest.folder / name for sha256 in manifest.allowed(name)):
        return True
    return not (manifest.folder / name).is_file() and any(name not in g for g in manifest.generations)
