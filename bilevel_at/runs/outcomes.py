"""The stored outcome of every example of an attack, as readers of a run take it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .directory import RunDir

__all__ = ["outcomes"]


def outcomes(run: Path, entry: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """The outcome of each example, from the file of an entry of ``results.json``.

    Args:
        run: the directory.
        entry: the entry.

    Returns:
        Labels and ``correct``; None if the file is not in the run's directory, or belongs to another evaluation.

    Raises:
        InputError: if the file is damaged.
    """
    file = run / entry["file"]
    if not file.is_file() or run.resolve() not in file.resolve().parents:
        return None
    arrays = RunDir(run).read_arrays(file.resolve().relative_to(run.resolve()).as_posix())
    missing = [name for name in ("label", "correct") if name not in arrays]
    if missing:
        raise InputError(f"{file} is not an evaluation's arrays (label, correct): it has no {missing[0]}")
    if "identity" in arrays and not _is_of(arrays, entry):
        return None
    label, correct = arrays["label"], arrays["correct"]
    if label.dtype.kind not in "iu":
        raise InputError(f"{file}: label is {label.dtype}; it must hold whole numbers")
    if correct.dtype != np.bool_ or correct.ndim != 1 or correct.shape != label.shape or not len(correct):
        raise InputError(
            f"{file}: correct is {correct.dtype}{list(correct.shape)}; it must be bool, one for each label"
        )
    return label, correct


def _is_of(arrays: Any, entry: Mapping[str, Any]) -> bool:
    """Whether a file is the finished record of an entry, and not of a later, unfinished evaluation."""
    try:
        identity = json.loads(str(arrays["identity"]))
        settings = [identity[name] == entry[name] for name in ("attack", "data", "weights", "seed", "batch_size")]
        return bool(arrays["finished"]) and all(settings)
    except (KeyError, TypeError, ValueError):
        return False
