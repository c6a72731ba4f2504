"""The worst case over all attacks that were run: an example counts while none of them has broken it."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
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
    """The worst of the attacks at the ε of training that every run of the group was put to.

    From ``evaluation/WHICH/*.npz``; None where a run has not the examples' results of two attacks or more on the same
    images. Raises :class:`InputError` for a damaged file.
    """
    each = [per_example(run, which) for run in group.runs]
    common = [name for name in each[0] if all(name in found for found in each)]
    if len({*common} - {"clean"}) < 2:
        return None
    standing = [np.logical_and.reduce([found[name] for name in common]) for found in each]
    attacks = tuple(name for name in common if name != "clean")
    return WorstCase(Spread(tuple(float(s.mean()) for s in standing)), attacks, len(standing[0]))


def per_example(run: Run, which: str) -> dict[str, np.ndarray]:
    """attack -> whether each image survives it, ``[n]`` bool: at the ε of training, all of the same images.

    Where evaluations were of different images or norms, those that most attacks have in common.
    """
    entries = {
        name: entry
        for name, entry in run.at_training_radius(which).items()
        if isinstance(entry.get("file"), str) and isinstance(entry.get("data"), str) and entry["data"]
    }
    attacked = [name for name in entries if name != "clean"]
    kinds = Counter(_kind(entries[name]) for name in attacked)
    if not kinds:
        return {}
    kind = kinds.most_common(1)[0][0]
    kept = [n for n in entries if _kind(entries[n]) == kind or (n == "clean" and _kind(entries[n])[:2] == kind[:2])]
    return _same_images({name: found for name in kept if (found := _load(run, entries[name])) is not None})


def _kind(entry: Mapping[str, Any]) -> tuple[str, str, str, float]:
    at = round(number(entry.get("epsilon")), 9)
    return entry["data"], str(entry.get("weights")), str(entry.get("norm")), at


def _load(run: Run, entry: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """(labels, correct) of an entry's file; None where it is not there."""
    file = run.path / entry["file"]
    if not file.is_file() or run.path.resolve() not in file.resolve().parents:
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            label, correct = arrays["label"], arrays["correct"]
            if "identity" in arrays.files and not _is_of(arrays, entry):
                return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} is not an evaluation's arrays (label, correct): {reason}") from None
    if correct.dtype != np.bool_ or correct.ndim != 1 or correct.shape != label.shape or not len(correct):
        raise InputError(
            f"{file}: correct is {correct.dtype}{list(correct.shape)}; it must be bool, one for each label"
        )
    return label, correct


def _is_of(arrays: Any, entry: Mapping[str, Any]) -> bool:
    """Whether a file is the finished record of an entry, and not what a later, unfinished evaluation has left."""
    try:
        identity = json.loads(str(arrays["identity"]))
        settings = [identity[name] == entry[name] for name in ("attack", "data", "weights", "seed", "batch_size")]
        return bool(arrays["finished"]) and all(settings)
    except (KeyError, TypeError, ValueError):
        return False


def _same_images(found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    labels: Sequence[np.ndarray] = [label for label, _ in found.values()]
    if any(not np.array_equal(labels[0], label) for label in labels):
        return {}  # the fingerprints agree and the labels do not: not for us to say which is right
    return {name: correct for name, (_, correct) in found.items()}
