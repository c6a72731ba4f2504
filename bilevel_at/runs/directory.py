"""The files of a run: ``config.json``, ``metrics.jsonl``, ``history.npz``, ``last.pt``, ``best.pt``,
``results.json`` with ``evaluation/``, and figures.

After catastrophic overfitting, ``last_good.pt`` has the weights of the epoch before it. ``memory-*.pt`` is what
policies remember; ``manifest.json`` has the SHA-256 of these files, and ``*-before.*`` are those of the generation
before: see :mod:`bilevel_at.runs.manifest`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, reason
from .checkpoints import FORMAT, checked, load_tensors, weights
from .files import Files, plain
from .manifest import CONFIG, GENERATIONAL, Manifest, is_memory, tell
from .memories import apart, joined, name_of
from .saving import restore

__all__ = ["CHECKPOINTS", "RunDir", "plain"]

METRICS, RESULTS, CHECKS = "metrics.jsonl", "results.json", "checks.json"
CHECKPOINTS = ("best", "last", "last_good")
"""Best by held-out robust accuracy, the last epoch, and the last before catastrophic overfitting."""


class RunDir(Files):
    """A run directory.

    Args:
        path: the directory; if it does not exist, it is made when the first file is written.
    """

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
        present = [name for name in (*GENERATIONAL, RESULTS) if (self.path / name).exists()]
        manifest = Manifest.read(self.path)
        if manifest is not None and any(manifest.generations):
            present.append("manifest.json")  # the files that it lists are lost, or elsewhere
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
            tell(f"{message} ({len(self.metrics())} epochs)")

    @property
    def checkpoints(self) -> list[str]:
        """The names of the checkpoints in the directory, in the order of :data:`CHECKPOINTS`."""
        return [which for which in CHECKPOINTS if self.has_checkpoint(which)]

    def has_checkpoint(self, which: str) -> bool:
        """Whether there is a checkpoint of this name, which need not be one of :data:`CHECKPOINTS`."""
        manifest = Manifest.read(self.path)
        if manifest is not None:
            return bool(manifest.allowed(f"{which}.pt"))
        return (self.path / f"{which}.pt").is_file()

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
            rest["memories"] = name_of(which, tensors)
            self._saving.keep_memory(rest["memories"], lambda file: torch.save(tensors, file))
        self.write(f"{which}.pt", lambda file: torch.save({**rest, "format": FORMAT}, file))

    def save_weights_of(self, which: str, to: str) -> None:
        """Save the weights of a checkpoint, and its number of epochs, as another one."""
        state = self.checkpoint(which, memories=False)
        self.save_checkpoint(to, {"model": weights(state), "epochs": state["epochs"]})

    def remove_checkpoint(self, which: str) -> None:
        if self.has_checkpoint(which):
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
        if not self.has_checkpoint(which):
            raise InputError(f"{self.path} has no {which}.pt")
        state = checked(self.path / f"{which}.pt", self._tensors(f"{which}.pt", device))
        name = state.get("memories")
        if not memories or name is None:
            return state
        if not isinstance(name, str) or not is_memory(name) or Path(name).name != name:
            raise InputError(f"{self.path / which}.pt names memories that are not a file of the run")
        if not (self.path / name).is_file():
            raise InputError(f"{self.path} has no {name}, which {which}.pt needs")
        return joined(state, self._tensors(name, device))

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
        except (ValueError, RecursionError, MemoryError) as error:
            raise InputError(f"{file} is not a file of JSON lines: {reason(error)}") from None
        if epochs is not None:
            lines = lines[:epochs]
            if "".join(json.dumps(line) + "\n" for line in lines) != text:
                self.write_metrics(lines)
        return lines
