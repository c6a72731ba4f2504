"""The worst case over all attacks that were run: an example counts as correct if no attack breaks it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runs.evaluations import outcomes
from ..runs.record import Run
from .groups import Group
from .numbers import Spread, number

__all__ = ["WorstCase", "per_example", "worst_case"]


@dataclass(frozen=True)
class WorstCase:
    """Accuracy under the union of attacks.

    Args:
        spread: the accuracies over seeds.
        attacks: the names of the attacks.
        n: the number of images.
    """

    spread: Spread
    attacks: tuple[str, ...]
    n: int


def worst_case(group: Group, which: str) -> WorstCase | None:
    """Accuracy under the union of those attacks in the threat with which every run of the group was evaluated.

    Args:
        group: the runs, whose ``evaluation/WHICH/*.npz`` are read.
        which: the checkpoint's name.

    Returns:
        None if a run lacks the outcomes of at least two attacks on the same images.

    Raises:
        InputError: if a file is damaged.
    """
    survivors = [per_example(run, which) for run in group.runs]
    common = [name for name in survivors[0] if all(name in outcome for outcome in survivors)]
    if len({*common} - {"clean"}) < 2:
        return None
    standing = [np.logical_and.reduce([outcome[name] for name in common]) for outcome in survivors]
    attacks = tuple(name for name in common if name != "clean")
    return WorstCase(Spread(tuple(float(s.mean()) for s in standing)), attacks, len(standing[0]))


def per_example(run: Run, which: str) -> dict[str, np.ndarray]:
    """attack -> ``[n]`` bool, whether each image is classified correctly. All are in the threat, of the same images.

    If evaluations differ in images or norms, the most frequent combination is chosen.
    """
    entries = {
        name: entry
        for name, entry in run.under_threat(which).items()
        if isinstance(entry.get("file"), str) and isinstance(entry.get("data"), str) and entry["data"]
    }
    attacked = [name for name in entries if name != "clean"]
    kinds = Counter(_kind(entries[name]) for name in attacked)
    if not kinds:
        return {}
    kind = kinds.most_common(1)[0][0]
    names = [n for n in entries if _kind(entries[n]) == kind or (n == "clean" and _kind(entries[n])[:2] == kind[:2])]
    return _same_images({name: arrays for name in names if (arrays := outcomes(run.path, entries[name])) is not None})


def _kind(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    at = f"{number(entry.get('epsilon')):.9f} {entry.get('threat', '')}"
    return entry["data"], str(entry.get("weights")), str(entry.get("norm")), at


def _same_images(evaluations: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    labels: Sequence[np.ndarray] = [label for label, _ in evaluations.values()]
    if any(not np.array_equal(labels[0], label) for label in labels):
        return {}  # equal fingerprints, but different labels: which are right is unknown
    return {name: correct for name, (_, correct) in evaluations.items()}
