"""A cheap strong attack: short PGD, then the classes whose decision boundaries are nearest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..anchors import Anchor, anchor_policy
from ..batch import Batch
from ..constraints import Constraint
from ..directions import direction_of
from ..losses import AnyLoss, cross_entropy, input_gradient, margins, minus, negative_margin
from ..lower import Linearized

__all__ = ["Nearest", "nearest_classes"]

MOMENTUM = 0.75  # the weight of the new step, as in APGD (Croce and Hein, 2020, equation 3)
FIRST_STEP = 2.0  # the first step's length over the constraint's reach, as in APGD


def nearest_classes(model: nn.Module, batch: Batch, count: int, candidates: int, direction: str = "sign") -> Tensor:
    """The classes t of least distance to the linearised decision boundary, ``[B, count]``, the nearest first.

        (f_y − f_t)(x) / ‖∇_x (f_y − f_t)(x)‖_*

    among the ``candidates`` classes t ≠ y of the largest logits; ‖·‖_* is ‖·‖₁ for steps by "sign" and ‖·‖₂ otherwise.
    One forward pass, and a backward pass for each candidate. Source: MALT (Melamed et al., 2024), section 3, where the
    candidates are 100.

    Args:
        model: the network, in the mode it is attacked in.
        batch: the examples, with labels.
        count: the number of classes; at most one less than the network's.
        candidates: the number of classes compared; at least ``count``.
        direction: of the steps: "sign", or anything else.
    """
    x = batch.x.detach().requires_grad_()
    order = 1 if direction == "sign" else 2
    with torch.enable_grad():
        gaps = -margins(model, batch.replace(x=x), torch.zeros_like(x))
        classes = gaps.detach().argsort(1)[:, : min(candidates, gaps.shape[1] - 1)]
        distances = []
        for target in classes.T:
            gap = gaps.gather(1, target[:, None]).squeeze(1)
            (gradient,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
            distances.append(gap.detach() / gradient.flatten(1).norm(order, 1).clamp(min=1e-38))
    return classes.gather(1, torch.stack(distances, 1).argsort(1)[:, :count])


@dataclass(frozen=True)
class Nearest:
    """PGD on the cross-entropy, then on the margin of each of the nearest classes in turn.

    Every descent takes ``steps`` steps from a random start, of lengths that fall from twice the reach to 0 along half a
    cosine, with APGD's momentum. An image leaves as soon as any step breaks it. Classes are ranked once, at x, by
    :func:`nearest_classes` among three times as many of the largest logits. An image that nothing breaks takes
    steps · (classes + 1) gradients, and three for each class to rank them.

    In the manner of MALT (Melamed et al., 2024), with short descents in place of APGD's 100 steps.

    Args:
        constraint: C(x).
        steps: the number of steps of each descent.
        classes: the number of classes aimed at, one after the other.
        reach: how far the constraint reaches.
        restart: the number of the restart, for the name.
        start: the anchor of each descent.
    """

    constraint: Constraint
    steps: int
    classes: int
    reach: float
    restart: int = 0
    start: Anchor | str = field(default="uniform", repr=False)

    @property
    def name(self) -> str:
        return f"start {self.restart + 1}"

    def rows(self, classes: int) -> int:
        return 1

    def passes(self, classes: int) -> int:
        return (self.steps + 3) * (min(self.classes, classes - 1) + 1)

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        attacked, standing = self._descend(model, batch, minus(cross_entropy), generator)
        left = standing.nonzero().flatten()
        if len(left) == 0:
            return attacked
        targets = nearest_classes(model, batch[left], self.classes, 3 * self.classes, self._direction)
        part = batch[left].replace(targets=targets)
        for place in range(targets.shape[1]):
            aimed = part.replace(target=part.more["targets"][:, place])
            attacked[left], standing = self._descend(model, aimed, minus(negative_margin), generator)
            left, part = left[standing], part[standing]
            if len(left) == 0:
                break
        return attacked

    @property
    def _direction(self) -> str:
        return getattr(self.constraint, "steepest", "normalized")

    def _descend(
        self, model: nn.Module, batch: Batch, attack_loss: AnyLoss, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Attacked images ``[B, ...]``, and ``[B]`` bool, those that no step has broken."""
        lower = Linearized(attack_loss, self.constraint, self.start, "sign", self.reach)
        project, ahead = self.constraint.project, direction_of(self._direction)
        attacked, left = batch.x.clone(), torch.arange(len(batch), device=batch.x.device)
        delta = project(anchor_policy(self.start).draw(lower, model, batch, generator)[0], batch.x)
        before = delta
        for step in range(self.steps + 1):
            attacked[left] = batch.x + delta
            if step < self.steps:
                gradient, output = input_gradient(attack_loss, model, batch, delta, keep_output=True)
            else:
                with torch.no_grad():
                    output = model(batch.x + delta)
            stand = output.detach().argmax(1) == batch.y
            del output  # frees its graph before the next pass
            left = left[stand]
            if step == self.steps or len(left) == 0:
                break
            batch, delta, before, gradient = batch[stand], delta[stand], before[stand], gradient[stand]
            size = FIRST_STEP * self.reach * (1 + math.cos(math.pi * step / self.steps)) / 2
            moved = project(delta - size * ahead(gradient), batch.x)
            if step:  # the momentum of the step before
                moved = project(delta + MOMENTUM * (moved - delta) + (1 - MOMENTUM) * (delta - before), batch.x)
            before, delta = delta, moved
        standing = torch.zeros(len(attacked), dtype=torch.bool, device=attacked.device)
        standing[left] = True
        return attacked, standing
