"""A run directory, or that of an evaluated checkpoint, as a report reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, shown
from ..evaluate.threat import Threat
from .commands import read_commands
from .directory import CHECKS, METRICS, RESULTS, RunDir
from .headline import WorstCase, attack_and_radius, under_threat, worst_case
from .manifest import CONFIG
from .metrics import Collapse, catastrophic_overfitting, rank
from .numbers import number

__all__ = ["WHICH", "Run", "attack_and_radius", "headline", "number", "read", "read_all"]

WHICH = ("best", "last", "last_good", "model")  # checkpoints in a reader's order; "model": one without a run


@dataclass(frozen=True)
class Run:
    """The content of one run's files. An attribute is empty if its file is missing, as in older runs.

    Args:
        path: the directory.
        name: the directory's name, or its whole path if two runs of a report have the same name.
        config: ``config.json``.
        metrics: the lines of ``metrics.jsonl``.
        results: checkpoint -> attack -> entry of ``results.json``.
        checks: checkpoint -> entry of ``checks.json``.
        commands: the commands that made the evaluations, from ``evaluation/commands.json``.
        problem_files: the problem files named by the user, which define networks of some runs.
    """

    path: Path
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    results: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    checks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    commands: Sequence[Sequence[str]] = ()
    problem_files: Sequence[str] = ()

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints whose weights are in the directory."""
        return RunDir(self.path).checkpoints

    @property
    def examples(self) -> Path | None:
        """The figure of attacked images; None if the run drew none, or the file is a link out of the directory."""
        drawn = RunDir(self.path).examples
        own = drawn.is_file() and self.path.resolve() in drawn.resolve().parents
        return drawn if own and drawn.read_bytes()[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" else None

    def part(self, name: str) -> Mapping[str, Any]:
        """A section of the configuration; empty if there is no such section."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    @property
    def threat(self) -> Threat:
        """The threat model of the run; for older runs, derived from the evaluations if the configuration lacks it."""
        recorded = Threat.read(self.part("constraint"))
        if recorded is not None and (not recorded.is_ball or None not in (recorded.norm, recorded.epsilon)):
            return recorded
        return Threat(self._norm(), self._epsilon())

    @property
    def feasible_set(self) -> str | None:
        """The name of the constraint used in training; None if it is the threat."""
        name = self.config.get("feasible_set")
        return name if isinstance(name, str) and name else None

    @property
    def epsilon(self) -> float | None:
        """The radius of the threat."""
        return self.threat.epsilon

    @property
    def norm(self) -> str | None:
        """'linf' or 'l2' if the threat is recorded as such a ball, else None."""
        return self.threat.norm

    def _epsilon(self) -> float | None:
        """The recorded radius of the constraint, or else the largest radius evaluated without an explicit one."""
        for part in ("constraint", "problem"):
            if not math.isnan(value := number(self.part(part).get("epsilon"))):
                return value
        radii = [
            number(entry.get("epsilon"))
            for entries in self.results.values()
            for name, entry in entries.items()
            if attack_and_radius(name)[1] is None and name != "clean"
        ]
        return max((r for r in radii if not math.isnan(r)), default=None)

    def _norm(self) -> str | None:
        entries = [entry for which in self.results.values() for entry in which.values()]
        norms = [self.part("constraint").get("norm"), *(entry.get("norm") for entry in entries)]
        return next((norm for norm in norms if isinstance(norm, str)), None)

    @property
    def best_epoch(self) -> int | None:
        """The epoch of ``best.pt``, computed from the metrics by :func:`rank`."""
        try:
            return int(max(self.metrics, key=rank)["epoch"])
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def collapse(self) -> Collapse | None:
        """Catastrophic overfitting, if the metrics show it."""
        try:
            return catastrophic_overfitting(self.metrics)
        except (KeyError, TypeError):  # metrics without the numbers that are needed
            return None

    def under_threat(self, which: str) -> dict[str, Mapping[str, Any]]:
        """The results of a checkpoint under the run's threat, including ``clean``, by the attack's name.

        Results under other threats are left out, and so are those on fewer images than another result of the same
        attack.

        Args:
            which: the checkpoint's name.
        """
        return under_threat(self.results.get(which, {}), self.threat)


def read(path: str | Path, problem_files: Sequence[str] = ()) -> Run:
    """Read one run.

    Args:
        path: the directory.
        problem_files: problem files that define networks of runs.

    Raises:
        InputError: if the directory is not a run, or one of its files is damaged; the message has the file's name.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            f"there is no run {folder}: " + ("a run is a directory" if folder.exists() else "no such place")
        )
    if not (folder / CONFIG).is_file() and not (folder / RESULTS).is_file():
        raise InputError(f"{folder} is not a run: it has no config.json, as a run of bilevel_at.run does")
    try:
        return Run(
            path=folder,
            name=folder.resolve().name,
            config=_object(folder, CONFIG),
            metrics=_metrics(folder),
            results=_results(folder),
            checks=_sections(folder, CHECKS),
            commands=read_commands(folder),
            problem_files=problem_files,
        )
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from None


def read_all(paths: Sequence[str | Path], problem_files: Sequence[str] = ()) -> list[Run]:
    """Read several runs, and give them distinct names.

    Args:
        paths: the directories.
        problem_files: problem files that define networks of runs.

    Raises:
        InputError: if no run is given, one is given twice, or one cannot be read.
    """
    if not paths:
        raise InputError("no run is given; a report is about at least one")
    seen: dict[Path, str | Path] = {}
    for path in paths:
        place = Path(path).resolve()
        if place in seen:
            same = "" if str(path) == str(seen[place]) else f", once as {seen[place]}"
            raise InputError(f"{path} is given twice{same}; every run counts once")
        seen[place] = path
    runs = [read(path, problem_files) for path in paths]
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else replace(run, name=str(run.path)) for run in runs]


def _object(folder: Path, name: str) -> dict[str, Any]:
    if not RunDir(folder).has(name):
        return {}
    content = RunDir(folder).read_json(name)
    if not isinstance(content, dict):
        raise InputError(f"{folder / name} holds {type(content).__name__}; it must be a JSON object")
    return content


def _sections(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    sections = _object(folder, name)
    for which, section in sections.items():
        if not isinstance(section, dict):
            raise InputError(f"{folder / name}: {shown(which)} is {type(section).__name__}; it must be a JSON object")
    return sections


def _results(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    results = _sections(folder, RESULTS)
    for which, entries in results.items():
        for name, entry in entries.items():
            accuracy = number(entry.get("accuracy")) if isinstance(entry, dict) else math.nan
            if not 0 <= accuracy <= 1:
                raise InputError(
                    f"{folder / RESULTS}: {shown(which)}, {shown(name)} has no accuracy between 0 and 1; "
                    "bilevel_at.evaluate writes one"
                )
    return {w: results[w] for w in sorted(results, key=lambda w: (WHICH.index(w) if w in WHICH else len(WHICH), w))}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = RunDir(folder).metrics()
    for place, line in enumerate(lines, 1):
        if not isinstance(line, dict) or math.isnan(number(line.get("epoch"))):
            raise InputError(f"{folder / METRICS}: line {place} is not an epoch; each is a JSON object with one")
    return lines


def headline(path: str | Path, which: str = "best") -> WorstCase | None:
    """The accuracy of a run to quote: the worst case of all attacks in its threat, from ``results.json`` and its files.

    Args:
        path: the run directory.
        which: the checkpoint's name.

    Returns:
        None if no attack was made on that checkpoint.

    Raises:
        InputError: if the directory is not a run, or one of its files is damaged.
    """
    run = read(path)
    return worst_case(run.path, run.under_threat(which))
