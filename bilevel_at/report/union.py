"""The worst case over all attacks that were run: an example counts while none of them has broken it."""

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
    """Accuracy under the worst of ``attacks`` (and of none), over seeds; n images."""

    spread: Spread
    attacks: tuple[str, ...]
    n: int


def worst_case(group: Group, which: str) -> WorstCase | None:
    """The worst of the attacks in the threat that every run of the group was put to.

    From ``evaluation/WHICH/*.npz``; None where a run has not the examples' results of two attacks or more on the same
    images. Raises :class:`InputError` for a damaged file.
    """
    survivors = [per_example(run, which) for run in group.runs]
    common = [name for name in survivors[0] if all(name in outcome for outcome in survivors)]
    if len({*common} - {"clean"}) < 2:
        return None
    standing = [np.logical_and.reduce([outcome[name] for name in common]) for outcome in survivors]
    attacks = tuple(name for name in common if name != "clean")
    return WorstCase(Spread(tuple(float(s.mean()) for s in standing)), attacks, len(standing[0]))


def per_example(run: Run, which: str) -> dict[str, np.ndarray]:
    """attack -> whether each image survives it, ``[n]`` bool: in the threat, all of the same images.

    Where evaluations were of different images or norms, those that most attacks have in common.
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
        return {}  # the fingerprints agree and the labels do not: not for us to say which is right
    return {name: correct for name, (_, correct) in evaluations.items()}
