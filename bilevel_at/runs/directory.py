"""What a run leaves behind: ``config.json``, ``metrics.jsonl``, ``history.npz``, ``last.pt``, ``best.pt``,
``results.json`` with ``evaluation/``, and figures.

Where robustness collapsed there is also ``last_good.pt``, the epoch before.
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
    """What a file of JSON says of an object: its type, since its address would differ in every run."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def plain(value: Any) -> Any:
    """The value as it is read back from a file of JSON."""
    return json.loads(json.dumps(value, default=_type_name))


class RunDir:
    """A run directory. Files are replaced whole, so an interruption leaves the old one or the new one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        """Whether a run, or the evaluation of a checkpoint, lies here."""
        return (self.path / CONFIG).exists()

    @property
    def figures(self) -> Path:
        """The folder of the run's own figures, made where it is not there."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def examples(self) -> Path:
        """The figure of attacked images that a run draws."""
        return self.path / "figures" / "examples.png"

    def config(self) -> Any:
        """``config.json``; :class:`InputError` where it is missing or not JSON."""
        return self.read_json(CONFIG)

    def write_config(self, config: Mapping[str, Any]) -> None:
        self.write_json(CONFIG, config)

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write the configuration of a run that starts now; metrics and results that lie here belong to no run."""
        self.write_config(config)
        self.metrics(epochs=0)
        (self.path / RESULTS).unlink(missing_ok=True)

    def _replace(self, name: str, write: Any) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f".{name}.partial"
        partial.unlink(missing_ok=True)  # a link there would lead what is written to another file
        write(partial)
        os.replace(partial, self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, default=_type_name) + "\n"
        self._replace(name, lambda path: path.write_text(text))

    def read_json(self, name: str) -> Any:
        """The file's content; :class:`InputError` where it is missing or not JSON."""
        file = self.path / name
        if not file.is_file():
            raise InputError(f"{self.path} has no {name}; a run directory of bilevel_at.run does")
        try:
            return json.loads(file.read_text())
        except (ValueError, RecursionError) as error:  # not JSON, or not text, or nested without end
            raise InputError(f"{file} is not JSON: {error}") from None

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        def write(path: Path) -> None:
            with open(path, "wb") as file:  # given a path, numpy would add to its name
                np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy types what it takes too narrowly

        self._replace(name, write)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Plain arrays by name; none where there is no such file, or it is damaged. Nothing is unpickled."""
        try:
            with np.load(self.path / name, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
            return {}

    @property
    def checkpoints(self) -> list[str]:
        """The names of :data:`CHECKPOINTS` that are here."""
        return [which for which in CHECKPOINTS if (self.path / f"{which}.pt").is_file()]

    def save_checkpoint(self, which: str, state: Mapping[str, Any]) -> None:
        self._replace(f"{which}.pt", lambda path: torch.save({"format": FORMAT, **state}, path))

    def copy_checkpoint(self, which: str, to: str) -> None:
        self._replace(f"{to}.pt", lambda path: shutil.copyfile(self.path / f"{which}.pt", path))

    def remove_checkpoint(self, which: str) -> None:
        (self.path / f"{which}.pt").unlink(missing_ok=True)

    def checkpoint(self, which: str, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Tensors and plain values from a checkpoint.

        Raises :class:`InputError` for a file that holds anything else, of which nothing is run, and for another format.
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
        """The lines of ``metrics.jsonl``; with ``epochs``, lines past it are dropped from the file too."""
        file = self.path / METRICS
        text = file.read_text() if file.is_file() else ""
        try:
            # A line without its end was being written when the run was stopped.
            lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        except ValueError as error:
            raise InputError(f"{file} is not a file of JSON lines: {error}") from None
        if epochs is not None:
            lines = lines[:epochs]
            shortened = "".join(json.dumps(line) + "\n" for line in lines)
            if shortened != text:
                self._replace(METRICS, lambda path: path.write_text(shortened))
        return lines
