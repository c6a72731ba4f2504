"""What a run directory, or that of an evaluated checkpoint, holds for a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..evaluate.radius import number_from_text
from ..evaluate.threat import Threat
from .directory import CHECKS, CONFIG, METRICS, RESULTS, RunDir
from .evaluations import read_commands
from .metrics import Collapse, catastrophic_overfitting, rank

__all__ = ["WHICH", "Run", "attack_and_radius", "number", "read", "read_all"]

WHICH = ("best", "last", "last_good", "model")  # checkpoints in a reader's order; "model": one without a run


@dataclass(frozen=True)
class Run:
    """One run as its files have it. Files that are not there, as in older runs, leave their part empty.

    name: the directory's, or its whole path where two runs of a report have the same.
    results: checkpoint -> attack -> entry of ``results.json``. checks: checkpoint -> what ``checks.json`` says.
    commands: of ``evaluation/commands.json``, the evaluations that were run.
    problem_files: the problem files that a reader of the report names for runs whose networks they define.
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
        """The checkpoints whose weights are here."""
        return RunDir(self.path).checkpoints

    @property
    def examples(self) -> Path | None:
        """The figure of attacked images that the run has drawn; None where it has not, or the file leads elsewhere."""
        drawn = RunDir(self.path).examples
        own = drawn.is_file() and self.path.resolve() in drawn.resolve().parents
        return drawn if own and drawn.read_bytes()[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" else None

    def part(self, name: str) -> Mapping[str, Any]:
        """A section of the configuration, empty where there is none."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    @property
    def threat(self) -> Threat:
        """What the network is to withstand; of older runs, as far as their files say."""
        recorded = Threat.read(self.part("constraint"))
        if recorded is not None and (not recorded.is_ball or None not in (recorded.norm, recorded.epsilon)):
            return recorded
        return Threat(self._norm(), self._epsilon())

    @property
    def feasible_set(self) -> str | None:
        """The set of training's own attacker, by name, where it is not the threat."""
        name = self.config.get("feasible_set")
        return name if isinstance(name, str) and name else None

    @property
    def epsilon(self) -> float | None:
        """The radius of the threat."""
        return self.threat.epsilon

    @property
    def norm(self) -> str | None:
        """'linf' or 'l2', where the threat is such a ball and a file says so."""
        return self.threat.norm

    def _epsilon(self) -> float | None:
        """The radius of the constraint, or what the evaluations took for it."""
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
        """The epoch ``best.pt`` is of, by the rule that chose it."""
        try:
            return int(max(self.metrics, key=rank)["epoch"])
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def collapse(self) -> Collapse | None:
        """Catastrophic overfitting, where the metrics show it."""
        try:
            return catastrophic_overfitting(self.metrics)
        except (KeyError, TypeError):  # epochs that do not say enough
            return None

    def under_threat(self, which: str) -> dict[str, Mapping[str, Any]]:
        """The entries of a checkpoint in the threat of the run, ``clean`` among them, by the attack's name.

        Those in another set, and those on a few images of what there is a result on more of, are left out.
        """
        threat = self.threat
        entries: dict[str, Mapping[str, Any]] = {}
        for name, entry in self.results.get(which, {}).items():
            attack, at = attack_and_radius(name)
            if name.endswith("]") and "[n=" in name:
                continue
            if not threat.is_ball:
                if name == "clean" or (entry.get("threat") == threat.name and entry.get("norm") is None):
                    entries[name] = entry
                continue
            if entry.get("threat") or (threat.norm is not None and entry.get("norm") not in (None, threat.norm)):
                continue
            if at is None:
                entries[name] = entry
            elif threat.epsilon is not None and abs(number(entry.get("epsilon")) - threat.epsilon) < 1e-9:
                entries.setdefault(attack, entry)
        return entries


def number(value: Any) -> float:
    """A finite number of a file as a float; NaN for whatever else stands there."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan


def attack_and_radius(name: str) -> tuple[str, float | None]:
    """``pgd-50-10@8/255`` as its attack and ε; no ε where the name ends with none (paths may hold an @)."""
    attack, _, at = name.rpartition("@")
    try:
        return (attack, number_from_text(at)) if attack else (name, None)
    except ValueError:
        return name, None


def read(path: str | Path, problem_files: Sequence[str] = ()) -> Run:
    """Read one run. Raises :class:`InputError`, naming the file, where it is no run or a file of it is damaged."""
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
    """Read several runs, with names that tell them apart. Raises :class:`InputError` for one given twice."""
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
    if not (folder / name).is_file():
        return {}
    content = RunDir(folder).read_json(name)
    if not isinstance(content, dict):
        raise InputError(f"{folder / name} holds {type(content).__name__}; it must be a JSON object")
    return content


def _sections(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    sections = _object(folder, name)
    for which, section in sections.items():
        if not isinstance(section, dict):
            raise InputError(f"{folder / name}: {which!r} is {type(section).__name__}; it must be a JSON object")
    return sections


def _results(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    results = _sections(folder, RESULTS)
    for which, entries in results.items():
        for name, entry in entries.items():
            accuracy = number(entry.get("accuracy")) if isinstance(entry, dict) else math.nan
            if not 0 <= accuracy <= 1:
                raise InputError(
                    f"{folder / RESULTS}: {which!r}, {name!r} has no accuracy between 0 and 1; "
                    "bilevel_at.evaluate writes one"
                )
    return {w: results[w] for w in sorted(results, key=lambda w: (WHICH.index(w) if w in WHICH else len(WHICH), w))}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = RunDir(folder).metrics()
    for place, line in enumerate(lines, 1):
        if not isinstance(line, dict) or math.isnan(number(line.get("epoch"))):
            raise InputError(f"{folder / METRICS}: line {place} is not an epoch; each is a JSON object with one")
    return lines
