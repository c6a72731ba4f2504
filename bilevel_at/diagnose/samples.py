"""Training seen example by example: input gradient norms and steps, and groups of examples made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..runs.history import History

__all__ = ["Deciles", "average_gradient_norm", "deciles"]


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
        groups = f"ten groups of {int(sizes.min())} to {int(sizes.max())} examples"
        if self.balance is None:
            return groups
        low, high = self.balance.min().item(), self.balance.max().item()
        return f"{groups}; one class has between {low:.1%} and {high:.1%} of a group"


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
