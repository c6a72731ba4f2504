"""``--model-file``: the problem files whose networks a user lets be built in order to read runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError
from .directory import RunDir
from .networks import Which, described, load
from .problem_file import ProblemFile

__all__ = ["ModelFiles"]


class ModelFiles:
    """The problem files that a user names for runs whose networks they define: ``--model-file FILE ...``.

    A run directory records the path of such a file and its SHA-256. The path is never followed, because reading a run
    must not run code; a named file is run only for a run that records its SHA-256.

    paths: the files. Raises :class:`InputError` for one that does not exist.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._paths: dict[str, str] = {}
        for path in paths:
            if not Path(path).is_file():
                raise InputError(
                    f"--model-file {path} does not exist; it is the problem file that a run was trained from"
                )
            self._paths[hashlib.sha256(Path(path).read_bytes()).hexdigest()] = path

    def check_used(self, configs: Iterable[Mapping[str, Any]]) -> None:
        """Raise :class:`InputError` for a named file that defines the network of none of these runs."""
        recorded = [config.get("file_sha256") for config in configs if config.get("model") == "file"]
        for sha256, path in self._paths.items():
            if sha256 not in recorded:
                raise InputError(
                    f"--model-file {path} does not define the network of any of these runs, or has changed since: "
                    "none of them records its SHA-256"
                )

    def network(self, run: str | Path, config: Mapping[str, Any]) -> nn.Module | None:
        """The network that a run's problem file defines; None for a run of a network known by name.

        run: the directory, for messages.
        config: its ``config.json``.

        Raises :class:`InputError` where no named file has the recorded SHA-256.
        """
        if not isinstance(config, Mapping) or config.get("model") != "file":
            return None
        recorded = config.get("file_sha256")
        path = self._paths.get(recorded) if isinstance(recorded, str) else None
        if path is None and not self._paths:
            name = config.get("file")
            raise InputError(
                f"the network of {run} is defined in its problem file, which is not run unless you name it: "
                f"--model-file FILE (when the run was made, {str(name)[:100]!r})"
            )
        if path is None:
            named = ", ".join(self._paths.values())
            raise InputError(
                f"--model-file {named} is not the problem file of {run}, or has changed since: "
                f"its SHA-256 differs from the recorded {str(recorded)[:64]!r}"
            )
        _, shape, classes = described(run, config)
        file = ProblemFile(path)
        if file.model is None:
            raise InputError(f"{path} defines no model(shape, classes)")
        model: nn.Module = file.make(file.model, nn.Module, shape=shape, classes=classes)
        return model

    def load(self, run: str | Path, which: Which = "best") -> nn.Module:
        """A network of a run, as :func:`load` gives it, also where one of these files defines it."""
        return load(run, which, self.network(run, RunDir(run).config()))
