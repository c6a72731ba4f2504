"""``history.npz``: measurements of each training example in each epoch, and the first layer's filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .directory import RunDir

__all__ = ["History", "history_arrays", "read_history", "write_history"]

FILE = "history.npz"


@dataclass(frozen=True)
class History:
    """Measurements of each training example in each epoch, from ``history.npz``.

    Args:
        gradient_norm: ‖∇_δ ℓ_atk(θ, z_i)‖₂, ``[epochs, N]``, NaN where unknown.
        step: the step 1/λ of the attack, ``[epochs, N]``, NaN where unknown.
        label: ``[N]`` int64.
        filters: the first convolution's weights before training and after each epoch, ``[epochs + 1, O, I, kh, kw]``,
            or None.

    Raises:
        InputError: if shapes do not agree.
    """

    gradient_norm: Tensor
    step: Tensor
    label: Tensor
    filters: Tensor | None = None

    def __post_init__(self) -> None:
        norm, step, label = self.gradient_norm, self.step, self.label
        if norm.ndim != 2 or step.shape != norm.shape or label.shape != norm.shape[1:]:
            raise InputError(
                f"gradient_norm, step and label have shapes {tuple(norm.shape)}, {tuple(step.shape)} and "
                f"{tuple(label.shape)}; they must be [epochs, N], [epochs, N] and [N]"
            )
        if self.filters is not None and (self.filters.ndim != 5 or len(self.filters) != len(norm) + 1):
            raise InputError(
                f"filters have shape {tuple(self.filters.shape)}; after {len(norm)} epochs they must be "
                f"[{len(norm) + 1}, O, I, kh, kw]"
            )


def write_history(run: RunDir, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the recorder's arrays of the epochs so far."""
    run.save_arrays(FILE, arrays)


def history_arrays(run: RunDir) -> dict[str, np.ndarray]:
    """The arrays of ``history.npz`` by name, unchecked; empty if the file is missing or damaged."""
    return run.arrays(FILE)


def read_history(run_path: str | Path) -> History | None:
    """Read the ``history.npz`` of a run directory, without unpickling.

    Args:
        run_path: the run directory.

    Returns:
        The history, or None if the run has none.

    Raises:
        InputError: if the file is damaged or lacks arrays of :class:`History`.
    """
    run, file = RunDir(run_path), Path(run_path) / FILE
    if not run.has(FILE):
        return None
    arrays = run.read_arrays(FILE)
    missing = [name for name in ("gradient_norm", "step", "label") if name not in arrays]
    if missing:
        raise InputError(f"{file} has no {missing[0]}; a run's history has gradient_norm, step and label")
    wrong = [
        name
        for name in ("gradient_norm", "step", "label", "filters")
        if name in arrays and arrays[name].dtype.kind not in ("iu" if name == "label" else "f")
    ]
    if wrong:
        kind = "whole numbers" if wrong[0] == "label" else "floating-point numbers"
        raise InputError(f"{file}: {wrong[0]} is {arrays[wrong[0]].dtype}; it must hold {kind}")
    numbers = {
        name: torch.from_numpy(arrays[name].astype(np.float32))
        for name in ("gradient_norm", "step", "filters")
        if name in arrays
    }
    try:
        return History(label=torch.from_numpy(arrays["label"].astype(np.int64)), **numbers)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
