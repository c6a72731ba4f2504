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
from .checkpoints import load_tensors

__all__ = ["RunDir", "plainly"]


def plainly(value: Any) -> str:
    """What a file of JSON says of an object: its type, since its address would differ in every run."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


class RunDir:
    """A run directory. Files are replaced whole, so an interruption leaves the old one or the new one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def figures(self) -> Path:
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    def _replace(self, name: str, write: Any) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f".{name}.partial"
        partial.unlink(missing_ok=True)  # a link there would lead what is written to another file
        write(partial)
        os.replace(partial, self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, default=plainly) + "\n"
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

    def save(self, name: str, value: Any) -> None:
        self._replace(name, lambda path: torch.save(value, path))

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

    def copy(self, name: str, to: str) -> None:
        self._replace(to, lambda path: shutil.copyfile(self.path / name, path))

    def restore(self, name: str, device: torch.device | str = "cpu") -> Any:
        """Tensors and plain values from a checkpoint; a file that holds anything else is refused, not run."""
        file = self.path / name
        if not file.is_file():
            raise InputError(f"{self.path} has no {name}")
        return load_tensors(file, device)

    def append_metrics(self, line: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "metrics.jsonl").is_symlink():
            raise InputError(f"{self.path / 'metrics.jsonl'} is a link; a run's files are its own")
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self, epochs: int | None = None) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; with ``epochs``, lines past it are dropped from the file too."""
        file = self.path / "metrics.jsonl"
        text = file.read_text() if file.is_file() else ""
        try:
            # A line without its end was being written when the run was stopped.
            lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        except ValueError as error:
            raise InputError(f"{file} is not a file of JSON lines: {error}") from None
        if epochs is not None:
            lines = lines[:epochs]
            kept = "".join(json.dumps(line) + "\n" for line in lines)
            if kept != text:
                self._replace("metrics.jsonl", lambda path: path.write_text(kept))
        return lines
