"""Training seen example by example: input gradient norms and steps, and groups of examples made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Deciles", "History", "average_gradient_norm", "deciles", "read_history"]


@dataclass(frozen=True)
class History:
    """What a run kept of each training example in each epoch, ``history.npz``.

    gradient_norm: ‖∇_δ ℓ_atk(θ, z_i)‖₂, ``[epochs, N]``, NaN where unknown. step: the step 1/λ it was attacked with,
    ``[epochs, N]``, NaN where unknown. label: ``[N]`` int64. filters: the first convolution's weights before training
    and after each epoch, ``[epochs + 1, O, I, kh, kw]``, or None.
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


def read_history(run_path: str | Path) -> History | None:
    """The ``history.npz`` of a run directory, or None where it has none. Nothing pickled is loaded.

    Raises :class:`InputError` where the file is damaged or does not hold the arrays of :class:`History`.
    """
    file = Path(run_path) / "history.npz"
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # damaged archives fail in many ways, all of them inside np.load
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} is not an archive of plain arrays: {reason}") from None
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


def average_gradient_norm(history: History) -> Tensor:
    """GN(x_i) = (1/n) Σ_j ‖∇_δ ℓ_atk(θ_j, z_i^j)‖₂ over the n epochs j where it is known, ``[N]``; NaN where n = 0.

    z_i^j is the anchor of example i in epoch j: where a single step begins, and where the last one of several does.
    Source: ATAS (Huang et al., 2023), section III.
    """
    return history.gradient_norm.nanmean(0)


@dataclass(frozen=True)
class Deciles:
    """Ten groups of examples by the rank of a value.

    group: 0 (the smallest values) … 9, ``[N]`` int64; −1 where the value is NaN.
    balance: the share of each class in each group, ``[10, classes]``, or None where no labels were given.
    """

    group: Tensor
    balance: Tensor | None = None

    def rows(self, first: int, last: int) -> Tensor:
        """The positions of the examples in deciles ``first`` … ``last``, counted from 1: D_first^last in the paper."""
        if not 1 <= first <= last <= 10:
            raise InputError(f"deciles {first} … {last} do not exist; they are 1 … 10, in order")
        return ((self.group >= first - 1) & (self.group <= last - 1)).nonzero().flatten()

    def __str__(self) -> str:
        sizes = torch.bincount(self.group[self.group >= 0], minlength=10)
        said = f"ten groups of {int(sizes.min())} to {int(sizes.max())} examples"
        if self.balance is None:
            return said
        low, high = self.balance.min().item(), self.balance.max().item()
        return f"{said}; one class has between {low:.1%} and {high:.1%} of a group"


def deciles(values: Tensor, label: Tensor | None = None, *, by_class: bool = False) -> Deciles:
    """group_i = ⌊10 · rank_i / n⌋, rank_i in 0 … n − 1 the place of value i among the n values that are not NaN.

    values: ``[N]``. label: ``[N]``, for the balance of classes. Equal values are ranked in the order they stand in, so
    that the groups are always of equal size (to within one) and ties may be in different groups. (The paper's rank,
    the share of smaller values, is the same without ties.) by_class: rank each value among those of its own class, so
    that every group has a tenth of every class, where the values of some classes are larger; n is then the class's.

    Raises :class:`InputError` where fewer than ten values are known, the shapes differ, or ``by_class`` has no labels.
    Source: ATAS (Huang et al., 2023), section III.
    """
    if values.ndim != 1 or (label is not None and label.shape != values.shape):
        shapes = f"{tuple(values.shape)}" + ("" if label is None else f" and {tuple(label.shape)}")
        raise InputError(f"values (and labels) have shape {shapes}; they must be [N]")
    known = (~values.isnan()).nonzero().flatten()
    if len(known) < 10:
        raise InputError(f"{len(known)} of the values are known; ten groups need at least 10")
    if by_class and label is None:
        raise InputError("by_class is True, but there are no labels; pass deciles(values, label, by_class=True)")
    ranked = [known]
    if by_class and label is not None:
        ranked = [known[label[known] == c] for c in label[known].unique()]
    group = torch.full(values.shape, -1, dtype=torch.int64, device=values.device)
    for rows in ranked:
        order = rows[values[rows].argsort(stable=True)]
        group[order] = torch.arange(len(order), device=values.device) * 10 // len(order)
    if label is None:
        return Deciles(group)
    classes = int(label.max()) + 1
    table = torch.bincount(group[known] * classes + label[known], minlength=10 * classes).reshape(10, classes)
    return Deciles(group, table / table.sum(1, keepdim=True))
