"""One lower problem per target class, all solved at once by an ordinary torch optimiser (BETA)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from .anchors import Anchor, anchor_policy
from .batch import Batch
from .constraints import Constraint
from .errors import InputError
from .losses import Loss, minus, negative_margin
from .modes import Mode, attack_mode, no_graph
from .problem import LowerProblem, Solution
from .steps import positive

__all__ = ["Targeted", "other_classes"]


def other_classes(y: Tensor, classes: int) -> Tensor:
    """The classes j ≠ y in order, ``[B, classes − 1]``."""
    others = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    return others + (others >= y[:, None])


@dataclass(eq=False)
class Targeted(LowerProblem):
    """A perturbation for every class j ≠ y, and the best of them.

        η_j ∈ argmin_{η ∈ C(x)} ℓ_atk(θ, η; target j)        j* = argmin_j ℓ_atk(θ, η_j; target j)

    constraint: C(x).
    attack_loss: reads ``batch.target``; by default minus the negative margin, −M_j = f_y − f_j.
    optimizer: any torch optimiser class or factory, called as ``optimizer([η], lr=step)``. Elementwise ones (SGD,
        RMSprop, Adam) treat the classes and samples separately, as the paper does; LBFGS would couple them.
    steps, step: how many of its steps, each followed by the projection onto C(x), and their learning rate.
    schedule: a torch scheduler class or factory, called as ``schedule(optimizer)``, that changes the rate after every
        step; a constant rate if not given.
    ranks: aim only at these classes, counted from 0 in the order of falling margins M_j(x); all of them if not given.
    keep: "best" returns η_{j*} with δ shaped like x; "all" returns every η_j, rows ``i·(K−1) … (i+1)·(K−1) − 1`` of
        δ being example i's, in the order of the classes without y, or of ``ranks``.
    anchor: where the η_j start; each class draws its own.
    mode: 'train' or 'eval', the mode in which attack passes see the model.

    Raises :class:`InputError` where steps or step is not positive, and where the model has fewer than two outputs.
    ``solution.batch.target`` holds the classes. g has no proximal term, so the KKT solvers need a ``damping``.
    Source: BETA (Robey et al., 2023), Algorithm 1 and equations 17 to 19.
    """

    constraint: Constraint
    attack_loss: Loss = minus(negative_margin)  # noqa: RUF009 (stateless)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.RMSprop
    steps: int = 30
    step: float = 2 / 255
    keep: Literal["best", "all"] = "best"
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    ranks: range | None = None
    anchor: Anchor | str = "uniform"
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; at least 1 is needed")
        positive("step", self.step)
        self.anchor = anchor_policy(self.anchor)

    def objective(self, model: nn.Module, batch: Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        """ℓ_atk ``[rows of δ]``; without targets in ``batch``, the best class's."""
        with attack_mode(model, self.mode):
            return self.attack_loss(model, batch, delta)

    def _targets(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The classes aimed at, ``[B, T]``, and how many there are."""
        with attack_mode(model, "eval"), no_graph():
            out = model(batch.x)
        classes = int(out.shape[-1])
        if classes < 2:
            raise InputError(f"the model has {classes} output; a targeted attack needs at least 2 classes")
        if batch.target is not None:
            return batch.target[:, None], classes
        if self.ranks is None:
            return other_classes(batch.y, classes), classes
        others = out.scatter(1, batch.y[:, None], -torch.inf)  # margins without f_y, which orders nothing
        chosen = others.argsort(1, descending=True)[:, : classes - 1][:, self.ranks.start : self.ranks.stop]
        if chosen.shape[1] == 0:
            raise InputError(f"ranks are {self.ranks}; the model has {classes - 1} classes to aim at, from 0 on")
        return chosen, classes

    def solve(
        self,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Solution:
        """The perturbations and their targets. ``anchor`` has one row per example, or one per example and class.

        A batch that has targets already is aimed at those alone: ``solve(model, solution.batch, solution.anchor)``
        gives ``solution`` again.
        """
        targets, classes = self._targets(model, batch)
        each = targets.shape[1]
        wide = batch.repeat(each).aimed_at(targets.flatten())
        if wide.index is not None:  # what is remembered is remembered per example and class
            wide = replace(wide, index=wide.index * classes + targets.flatten())
        with torch.enable_grad(), attack_mode(model, self.mode):
            seen = self.prepare(model, wide)
            if anchor is None:
                z = self.draw_anchor(model, seen, generator)
            else:
                z = anchor.detach()
                z = z if len(z) == len(wide) else z.repeat_interleave(each, 0)
            eta = nn.Parameter(z.clone())
            optimizer = self.optimizer([eta], lr=self.step)
            schedule = None if self.schedule is None else self.schedule(optimizer)

            def closure() -> Tensor:
                total = self.attack_loss(model, seen, eta).sum()
                (eta.grad,) = torch.autograd.grad(total, eta)
                return total.detach()

            for _ in range(self.steps):
                optimizer.step(closure)  # type: ignore[arg-type]  # torch types the closure as returning float
                eta.data = self.constraint.project(eta.data, wide.x)
                if schedule is not None:
                    schedule.step()
            delta = eta.detach()
            if anchor is None:
                self.policy().remember(wide, delta)
            if self.keep == "all":
                return Solution(delta, z, wide)
            with no_graph():
                values = self.attack_loss(model, seen, delta).reshape(-1, each)
        best = values.argmin(1)
        rows = torch.arange(len(batch), device=best.device) * each + best
        return Solution(delta[rows], z[rows], batch.aimed_at(targets.flatten()[rows]))
