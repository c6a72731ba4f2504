"""``--problem-file``: problem files that the user allows to be run in order to read runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..constraints import Constraint
from ..errors import InputError
from ..evaluate.threat import Threat, ball, set_name
from ..problem import BilevelProblem
from .directory import RunDir
from .networks import Which, described, load
from .problem_file import ProblemFile
from .shared import is_shared

__all__ = ["NamedFiles"]


class NamedFiles:
    """The problem files that a user names for runs whose network or threat they define: ``--problem-file FILE ...``.

    A run directory records the path of such a file and its SHA-256. The path is never followed, because reading a run
    must not run code; a named file is run only for a run that records its SHA-256.

    Args:
        paths: the files.

    Raises:
        InputError: if a file does not exist.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._paths: dict[str, str] = {}
        for path in paths:
            if not Path(path).is_file():
                raise InputError(
                    f"--problem-file {path} does not exist; it is the problem file that a run was trained from"
                )
            self._paths[hashlib.sha256(Path(path).read_bytes()).hexdigest()] = path

    def check_used(self, configs: Iterable[Mapping[str, Any]]) -> None:
        """Check that every named file defines the network or the threat of one of these runs.

        Args:
            configs: the runs' ``config.json``.

        Raises:
            InputError: if a file defines neither.
        """
        recorded = [config.get("file_sha256") for config in configs if self.wanted(config)]
        for sha256, path in self._paths.items():
            if sha256 not in recorded:
                raise InputError(
                    f"--problem-file {path} defines neither network nor threat of any of these runs, or has changed "
                    "since: none of them records its SHA-256"
                )

    @staticmethod
    def wanted(config: Mapping[str, Any]) -> bool:
        """Whether a run's problem file defines its network, or a threat that config.json cannot give again."""
        threat = Threat.read(config.get("constraint"))
        return config.get("model") == "file" or (threat is not None and not threat.is_ball)

    def _path(self, run: str | Path, config: Mapping[str, Any], what: str, otherwise: str = "") -> str:
        """The named file that has the run's recorded SHA-256; :class:`InputError` where none has."""
        recorded = config.get("file_sha256")
        path = self._paths.get(recorded) if isinstance(recorded, str) else None
        if path is None and not self._paths:
            name = config.get("file")
            raise InputError(
                f"{what} of {run} is defined in its problem file, which is not run unless you name it: "
                f"--problem-file FILE (when the run was made, {str(name)[:100]!r}){otherwise}"
            )
        if path is None:
            named = ", ".join(self._paths.values())
            raise InputError(
                f"--problem-file {named} is not the problem file of {run}, or has changed since: "
                f"its SHA-256 differs from the recorded {str(recorded)[:64]!r}"
            )
        return path

    def threat(self, run: str | Path, config: Mapping[str, Any]) -> Constraint:
        """Reconstruct the threat of a run: a ball from its record, any other set from its problem file.

        Args:
            run: the directory, for messages.
            config: its ``config.json``.

        Raises:
            InputError: if no named file has the recorded SHA-256, or the file makes another threat than recorded.
        """
        recorded = Threat.read(config.get("constraint"))
        if recorded is None:
            raise InputError(f"{run}/config.json names no threat")
        if recorded.is_ball and recorded.epsilon is not None:
            return ball(recorded.norm or "linf", recorded.epsilon)
        what = f"the threat {recorded.name[:60]}"
        path = self._path(run, config, what, "; or give --norm and --epsilon for a ball")
        arguments = config.get("problem")
        file = ProblemFile(path)
        problem = file.make(file.problem, BilevelProblem, **(arguments if isinstance(arguments, dict) else {}))
        threat: Constraint = problem.threat
        if Threat.of(threat).key != recorded.key:
            raise InputError(
                f"{path} makes the threat {set_name(threat)}, where {run} has {recorded.name[:60]} on record; "
                "something that the file imports has changed"
            )
        return threat

    def network(self, run: str | Path, config: Mapping[str, Any]) -> nn.Module | None:
        """The network that a run's problem file defines; None for a run of a network known by name.

        Args:
            run: the directory, for messages.
            config: its ``config.json``.

        Raises:
            InputError: if no named file has the recorded SHA-256.
        """
        if not isinstance(config, Mapping) or config.get("model") != "file":
            return None
        path = self._path(run, config, "the network")
        _, shape, classes = described(run, config)
        file = ProblemFile(path)
        if file.model is None:
            raise InputError(f"{path} defines no model(shape, classes)")
        model: nn.Module = file.make(file.model, nn.Module, shape=shape, classes=classes)
        return model

    def load(self, run: str | Path, which: Which = "best") -> nn.Module:
        """Load a network of a run, which may be defined in one of these files.

        Args:
            run: the directory.
            which: the checkpoint, as for :func:`load`.

        Raises:
            InputError: if the network cannot be loaded, or no named file has the recorded SHA-256.
        """
        return load(run, which, None if is_shared(run) else self.network(run, RunDir(run).config()))
