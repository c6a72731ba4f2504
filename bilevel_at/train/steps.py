"""What the trainer takes from a step: measurements, looks at what was attacked, and groups of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import InputError
from ..modes import attack_mode, autocast
from ..shares import Share
from ..solution import Hypergradient, Solution

__all__ = ["Dealt", "check_coupling", "groups_of", "look", "measured"]

Dealt = tuple[Batch, Share | None]
"""A batch, and what part of a whole one it is."""


def measured(step: Hypergradient) -> Tensor:
    """(loss, ‖implicit term‖ / ‖∇_θ f‖, the cosine between the two), float64."""
    loss = step.loss.double()
    if not step.implicit:
        return torch.stack([loss, loss.new_zeros(()), loss.new_zeros(())])
    ratio = step.implicit_norm / step.direct_norm.clamp(min=1e-30)
    return torch.stack([loss, ratio.double(), step.implicit_cosine.double()])


def look(model: nn.Module, solution: Solution, precision: str) -> Tensor:
    """(correct on x + δ*, the sum of ‖δ*‖_∞, rows): what training saw, before the step is taken."""
    batch, delta = solution.batch, solution.delta
    with torch.no_grad(), attack_mode(model, "eval"), autocast(precision, delta.device):
        right = model(batch.x + delta).argmax(1) == batch.y
    sizes = delta.flatten(1).abs().amax(1)
    return torch.stack([right.sum().double(), sizes.sum().double(), sizes.new_tensor(len(sizes)).double()])


def check_coupling(losses: Tensor, accumulate: int) -> None:
    """Refuse to add up parts of a batch whose examples are coupled: the sum is not the loss of the whole.

    Args:
        losses: the upper loss of a part, ``[B]`` or one number.
        accumulate: how many parts are added up.

    Raises:
        InputError: where the loss is one number and there are several parts.
    """
    if losses.ndim == 0 and accumulate > 1:
        raise InputError(
            f"--accumulate is {accumulate}, but the upper loss is one number for all of a batch, which has no parts to "
            "add up; use --accumulate 1"
        )


def groups_of(batches: Iterable[Dealt], size: int) -> Iterator[list[Dealt]]:
    """``size`` batches at a time; what is left at the end makes a smaller group."""
    group: list[Dealt] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
