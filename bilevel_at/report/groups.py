"""Groups of runs that differ only in their seed; a group is one row of a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluate.threat import Threat
from ..runs.record import WHICH, Run
from .numbers import Spread, number, radius

__all__ = ["Group", "all_runs", "by_threat", "group"]

# Options that change the trained network by rounding at most, and options that are recorded elsewhere in the
# configuration.
PASSED_OVER = (
    "seed",
    "out",
    "device",
    "memory_format",
    "data_dir",
    "download",
    "resume",
    "skip_nonfinite",
    "attacks",
    "solver",
    "problem",
)


@dataclass(frozen=True)
class Group:
    """Runs of one training with different seeds.

    Args:
        label: a short name, unique among groups.
        runs: in the order in which they were given.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def checkpoints(self) -> list[str]:
        """The evaluated checkpoints, in the order of :data:`WHICH`, then others."""
        return list(dict.fromkeys(which for which in WHICH for run in self.runs if which in run.results)) + list(
            dict.fromkeys(which for run in self.runs for which in run.results if which not in WHICH)
        )

    @property
    def main(self) -> str | None:
        """The checkpoint used in comparisons: the best epoch, if it was evaluated."""
        return next(iter(self.checkpoints), None)

    @property
    def threat(self) -> Threat:
        """The threat model, which is the same for all runs."""
        return self.runs[0].threat

    @property
    def epsilon(self) -> float | None:
        """The radius of the threat; None if it has none."""
        return self.threat.epsilon

    def accuracy(self, which: str, attack: str) -> Spread | None:
        """Accuracy under an attack in the threat, over the seeds with a result; None if there is none.

        Args:
            which: the checkpoint's name.
            attack: the attack's name.
        """
        entries = [run.under_threat(which).get(attack) for run in self.runs]
        values = tuple(number(entry["accuracy"]) for entry in entries if entry is not None)
        return Spread(values) if values else None

    def images(self, which: str, attack: str | None = None) -> set[int]:
        """The numbers of images of evaluations in the threat.

        Args:
            which: the checkpoint's name.
            attack: the attack's name; any attack if None.
        """
        entries = [run.under_threat(which) for run in self.runs]
        sizes = [e.get("n") for results in entries for name, e in results.items() if attack in (None, name)]
        return {n for n in sizes if isinstance(n, int)}

    @property
    def of_first(self) -> str:
        """The label, and of several runs the seed of the first, for what is shown of that one alone."""
        seed = self.runs[0].part("options").get("seed")
        return f"{self.label}, seed {seed}" if len(self.runs) > 1 and isinstance(seed, int) else self.label

    def seeds(self) -> str:
        """'1 run', '5 seeds'."""
        return f"{len(self.runs)} seeds" if len(self.runs) > 1 else "1 run"


def by_threat(groups: Iterable[Group]) -> list[tuple[str, list[Group]]]:
    """Pairs of a threat in words and its groups, in the order of first groups. Only groups of a pair are comparable.

    Different sets with the same name are numbered.
    """
    parts: dict[tuple[str, float | None, str], list[Group]] = {}
    for group in groups:
        parts.setdefault(group.threat.key, []).append(group)
    names = [part[0].threat.at for part in parts.values()]
    numbers = [names[: place + 1].count(name) for place, name in enumerate(names)]
    texts = [f"{name} ({i})" if names.count(name) > 1 else name for name, i in zip(names, numbers, strict=True)]
    return list(zip(texts, parts.values(), strict=True))


def all_runs(groups: Iterable[Group]) -> list[Run]:
    return [run for group in groups for run in group.runs]


def group(runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ only in their seed, in the order of first runs. A repeated seed starts another group."""
    parts: dict[tuple[str, int], list[Run]] = {}
    counts: dict[tuple[str, Any], int] = {}
    for run in runs:
        key = _key(run)
        occurrence = counts.get((key, _seed(run)), 0)
        counts[key, _seed(run)] = occurrence + 1
        parts.setdefault((key, occurrence), []).append(run)
    return [
        Group(label, tuple(part)) for label, part in zip(_labels(list(parts.values())), parts.values(), strict=True)
    ]


def _seed(run: Run) -> str:
    return repr(run.part("options").get("seed"))


def _key(run: Run) -> str:
    options = run.part("options")
    if "seed" not in options:
        return f"no seed: {run.path.resolve()}"
    settings = {name: value for name, value in options.items() if name not in PASSED_OVER}
    file = run.config.get("file_sha256", run.config.get("file"))
    parts = [file, run.config.get("data_sha256"), run.config.get("problem"), run.config.get("solver"), settings]
    if not run.threat.is_ball:
        parts.append(run.threat.key)
    return json.dumps(parts, sort_keys=True)


def _labels(parts: list[list[Run]]) -> list[str]:
    """The problem file's name, followed by the settings in which its groups differ, if there are several."""
    bases, labels = [_base(part[0]) for part in parts], []
    settings = [_settings(part[0]) for part in parts]
    for base, own in zip(bases, settings, strict=True):
        rivals = [s for b, s in zip(bases, settings, strict=True) if b == base]
        differs = [name for name in own if all(name in r for r in rivals) and any(r[name] != own[name] for r in rivals)]
        differences = [
            own[name] if name == "solver" else f"{name.replace('_', ' ')} {_short(own[name])}" for name in differs
        ]
        labels.append(", ".join([base, *differences[:3]]))
    return [
        label if labels.count(label) == 1 else f"{label} ({part[0].name})"
        for label, part in zip(labels, parts, strict=True)
    ]


def _base(run: Run) -> str:
    file = run.config.get("file")
    return (Path(file).stem if isinstance(file, str) else "") or run.name


def _settings(run: Run) -> dict[str, Any]:
    solver = {("solver" if name == "name" else name): value for name, value in run.part("solver").items()}
    options = {name: value for name, value in run.part("options").items() if name not in PASSED_OVER}
    return {**solver, **run.part("problem"), **options}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return radius(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else text[:23] + "…"
