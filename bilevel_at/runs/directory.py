"""The files of a run: ``config.json``, ``metrics.jsonl``, ``history.npz``, ``last.pt``, ``best.pt``,
``results.json`` with ``evaluation/``, and figures.

After catastrophic overfitting, ``last_good.pt`` is the checkpoint of the epoch before it.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .checkpoints import FORMAT, checked, load_tensors

__all__ = ["CHECKPOINTS", "RunDir", "plain"]

CONFIG, METRICS, RESULTS, CHECKS = "config.json", "metrics.jsonl", "results.json", "checks.json"
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

    Files are replaced atomically: an interruption leaves either the old version or the new one.

    Args:
        path: the directory; it does not have to exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

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
        """Write the configuration of a new run, and delete the metrics and results of an earlier run."""
        self.write_config(config)
        self.metrics(epochs=0)
        (self.path / RESULTS).unlink(missing_ok=True)

    def _replace(self, name: str, write: Any) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f".{name}.partial"
        partial.unlink(missing_ok=True)  # do not write through a symbolic link
        write(partial)
        os.replace(partial, self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, default=_type_name) + "\n"
        self._replace(name, lambda path: path.write_text(text))

    def read_json(self, name: str) -> Any:
        """The content of a JSON file.

        Args:
            name: the file's name in the directory.

        Raises:
            InputError: if the file is missing or is not JSON.
        """
        file = self.path / name
        if not file.is_file():
            raise InputError(f"{self.path} has no {name}; a run directory of bilevel_at.run does")
        try:
            return json.loads(file.read_text())
        except (ValueError, RecursionError) as error:  # not JSON, not text, or nested too deeply
            raise InputError(f"{file} is not JSON: {error}") from None

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        def write(path: Path) -> None:
            with open(path, "wb") as file:  # given a path, numpy would append .npz to its name
                np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's annotation is too narrow

        self._replace(name, write)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of an ``.npz`` file by name, without unpickling.

        Args:
            name: the file's name in the directory.

        Returns:
            An empty dictionary if the file is missing or damaged.
        """
        try:
            with np.load(self.path / name, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
            return {}

    @property
    def checkpoints(self) -> list[str]:
        """The names of the checkpoints in the directory, in the order of :data:`CHECKPOINTS`."""
        return [which for which in CHECKPOINTS if (self.path / f"{which}.pt").is_file()]

    def has_checkpoint(self, which: str) -> bool:
        """Whether there is a checkpoint of this name, which need not be one of :data:`CHECKPOINTS`."""
        return (self.path / f"{which}.pt").is_file()

    def save_checkpoint(self, which: str, state: Mapping[str, Any]) -> None:
        self._replace(f"{which}.pt", lambda path: torch.save({"format": FORMAT, **state}, path))

    def copy_checkpoint(self, which: str, to: str) -> None:
        self._replace(f"{to}.pt", lambda path: shutil.copyfile(self.path / f"{which}.pt", path))

    def remove_checkpoint(self, which: str) -> None:
        (self.path / f"{which}.pt").unlink(missing_ok=True)

    def checkpoint(self, which: str, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The tensors and plain values of a checkpoint. No code from the file is run.

        Args:
            which: one of :data:`CHECKPOINTS`.
            device: where tensors are loaded to.

        Raises:
            InputError: if the file is missing, contains anything else, or has another checkpoint format.
        """
        file = self.path / f"{which}.pt"
        if not file.is_file():
            raise InputError(f"{self.path} has no {which}.pt")
        return checked(file, load_tensors(file, device))

    def append_metrics(self, line: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / METRICS).is_symlink():
            raise InputError(f"{self.path / METRICS} is a link; a run's files are its own")
        with open(self.path / METRICS, "a") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self, epochs: int | None = None) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``.

        Args:
            epochs: keep only this many lines, and delete the others from the file.

        Raises:
            InputError: if the file is not JSON lines.
        """
        file = self.path / METRICS
        text = file.read_text() if file.is_file() else ""
        try:
            # A last line without a line break is incomplete: the run was stopped while writing it.
            lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        except ValueError as error:
            raise InputError(f"{file} is not a file of JSON lines: {error}") from None
        if epochs is not None:
            lines = lines[:epochs]
            shortened = "".join(json.dumps(line) + "\n" for line in lines)
            if shortened != text:
                self._replace(METRICS, lambda path: path.write_text(shortened))
        return lines
