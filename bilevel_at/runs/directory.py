"""The files of a run: ``config.json``, ``metrics.jsonl``, ``history.npz``, ``last.pt``, ``best.pt``,
``results.json`` with ``evaluation/``, and figures.

After catastrophic overfitting, ``last_good.pt`` has the weights of the epoch before it. ``memory-*.pt`` is what
policies remember; ``manifest.json`` has the SHA-256 of these files, and ``*-before.*`` are those of the generation
before: see :mod:`bilevel_at.runs.manifest`.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..errors import InputError
from .checkpoints import FORMAT, checked, load_tensors, weights
from .durable import sha256_of, writing
from .manifest import ABSENT, CONFIG, Manifest, is_memory, tell
from .memories import apart, name_of, together
from .saving import Saving, restore

__all__ = ["CHECKPOINTS", "RunDir", "plain"]

METRICS, RESULTS, CHECKS = "metrics.jsonl", "results.json", "checks.json"
CHECKPOINTS = ("best", "last", "last_good")
"""Best by held-out robust accuracy, the last epoch, and the last before catastrophic overfitting."""


def _type_name(value: Any) -> str:
    """The name of an object's type, written to JSON in place of a repr, whose address differs in every run."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def plain(value: Any) -> Any:
    """The value after a round trip through JSON."""
    return json.loads(json.dumps(value, default=_type_name))


class RunDir:
    """A run directory.

    Files are replaced atomically: an interruption leaves either the old version or the new one. What is read is
    compared with the manifest.

    Args:
        path: the directory; if it does not exist, it is made when the first file is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._there = self.path.is_dir()  # a directory that vanishes later is not made again
        self._saving: Saving | None = None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        """Whether the directory contains a run or the evaluation of a checkpoint."""
        return (self.path / CONFIG).exists()

    @property
    def figures(self) -> Path:
        """The folder of the run's own figures, created if it does not exist."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def examples(self) -> Path:
        """The path of the figure of attacked images that a run draws."""
        return self.path / "figures" / "examples.png"

    def config(self) -> Any:
        """The content of ``config.json``.

        Raises:
            InputError: if the file is missing or is not JSON.
        """
        return self.read_json(CONFIG)

    def write_config(self, config: Mapping[str, Any]) -> None:
        self.write_json(CONFIG, config)

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write the configuration of a new run.

        Raises:
            InputError: if the directory has files of a run whose ``config.json`` is missing.
        """
        present = [
            name for name in (METRICS, RESULTS, *(f"{w}.pt" for w in CHECKPOINTS)) if (self.path / name).exists()
        ]
        if present:
            raise InputError(f"{self.path} has {', '.join(present)} of a run but no {CONFIG}; choose another --out")
        self.write_config(config)

    def recover(self) -> None:
        """Go back to the newest generation of files that is whole, and warn if it is not the newest of all.

        Raises:
            InputError: if there is none.
        """
        manifest = Manifest.read(self.path)
        if manifest is not None and (message := restore(manifest)):
            tell(message)

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
            except (ValueError, RecursionError) as error:  # not JSON, not text, or nested too deeply
                raise InputError(f"{self.path / name} is not JSON: {error}") from None

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
            with self.open(name) as file, np.load(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # InputError is a ValueError
            tell(f"{self.path / name} is left out: {(str(error).splitlines() or [type(error).__name__])[0]}")
            return {}

    @property
    def checkpoints(self) -> list[str]:
        """The names of the checkpoints in the directory, in the order of :data:`CHECKPOINTS`."""
        manifest = Manifest.read(self.path)
        if manifest is not None:
            return [which for which in CHECKPOINTS if manifest.allowed(f"{which}.pt")]
        return [which for which in CHECKPOINTS if (self.path / f"{which}.pt").is_file()]

    def save_checkpoint(self, which: str, state: Mapping[str, Any]) -> None:
        """Save a checkpoint; the one of that name becomes the generation before.

        What the problem and the solver remember goes to a file of its own, which is written if it has changed.
        """
        if self._saving is None:
            with self.together():
                self.save_checkpoint(which, state)
            return
        rest, tensors = apart(state)
        if tensors:
            rest["memories"] = name_of(tensors)
            self._saving.keep_memory(rest["memories"], lambda file: torch.save(tensors, file))
        self.write(f"{which}.pt", lambda file: torch.save({**rest, "format": FORMAT}, file))

    def save_weights_of(self, which: str, to: str) -> None:
        """Save the weights of a checkpoint, and its number of epochs, as another one."""
        state = self.checkpoint(which, memories=False)
        self.save_checkpoint(to, {"model": weights(state), "epochs": state["epochs"]})

    def remove_checkpoint(self, which: str) -> None:
        if which in self.checkpoints:
            with self.together():
                assert self._saving is not None
                self._saving.remove(f"{which}.pt")

    def checkpoint(self, which: str, device: torch.device | str = "cpu", memories: bool = True) -> dict[str, Any]:
        """The tensors and plain values of a checkpoint. No code from the file is run.

        Args:
            which: one of :data:`CHECKPOINTS`.
            device: where tensors are loaded to.
            memories: also what policies remember; without it their tensors are left out.

        Raises:
            InputError: if the file is missing, contains anything else, or has another checkpoint format.
        """
        if which not in self.checkpoints:
            raise InputError(f"{self.path} has no {which}.pt")
        state = checked(self.path / f"{which}.pt", self._tensors(f"{which}.pt", device))
        name = state.get("memories")
        if not memories or name is None:
            return state
        if not isinstance(name, str) or not is_memory(name) or Path(name).name != name:
            raise InputError(f"{self.path / which}.pt names memories that are not a file of the run")
        if not (self.path / name).is_file():
            raise InputError(f"{self.path} has no {name}, which {which}.pt needs")
        return together(state, self._tensors(name, device))

    def _tensors(self, name: str, device: torch.device | str) -> Any:
        with self.open(name) as file:
            return load_tensors(self.path / name, device, file)

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.write(METRICS, lambda file: file.write(text.encode()))

    def metrics(self, epochs: int | None = None) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``.

        Args:
            epochs: keep only this many lines, and delete the others from the file.

        Raises:
            InputError: if the file is damaged, or not JSON lines.
        """
        file = self.path / METRICS
        manifest = Manifest.read(self.path)
        listed = manifest is not None and manifest.allowed(METRICS)
        text = ""
        try:
            if file.is_file() or listed:
                with self.open(METRICS) as opened:
                    text = opened.read().decode()
            # A last line without a line break is incomplete: the run was stopped while writing it.
            lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is not a file of JSON lines: {error}") from None
        if epochs is not None:
            lines = lines[:epochs]
            if "".join(json.dumps(line) + "\n" for line in lines) != text:
                self.write_metrics(lines)
        return lines


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
