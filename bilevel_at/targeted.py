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
from .errors import InputError, one_of, positive, whole_number
from .losses import AnyLoss, check_classes, minus, negative_margin
from .modes import Mode, attack_mode, no_graph
from .problem import LowerProblem, objective_gradient
from .solution import Solution

__all__ = ["Targeted", "other_classes"]


def other_classes(y: Tensor, classes: int) -> Tensor:
    """The classes j ≠ y in order, ``[B, classes − 1]``."""
    others = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    return others + (others >= y[:, None])


@dataclass(eq=False)
class Targeted(LowerProblem):
    """A perturbation for every class j ≠ y, and the best of them.

        η_j ∈ argmin_{η ∈ C(x)} ℓ_atk(θ, η; target j)        j* = argmin_j ℓ_atk(θ, η_j; target j)

    ``solution.batch.more`` has each row's class as "target", and all classes aimed at for its example as "aims". g has
    no proximal term, so the KKT solvers need a ``damping``. Source: BETA (Robey et al., 2023), Algorithm 1 and
    equations 17 to 19.

    Args:
        constraint: C(x).
        attack_loss: reads ``batch.more["target"]``; by default minus the negative margin, −M_j = f_y − f_j.
        optimizer: any torch optimiser class or factory, called as ``optimizer([η], lr=step)``. Elementwise ones (SGD,
            RMSprop, Adam) treat the classes and samples separately, as the paper does; LBFGS would couple them.
        steps: how many of its steps, each followed by the projection onto C(x).
        step: their learning rate.
        keep: "best" returns η_{j*} with δ shaped like x; "all" returns every η_j, rows ``i·(K−1) … (i+1)·(K−1) − 1`` of
            δ being example i's, in the order of the classes without y, or of ``ranks``.
        schedule: a torch scheduler class or factory, called as ``schedule(optimizer)``, that changes the rate after
            every step; a constant rate if not given.
        ranks: aim only at these classes, counted from 0 in the order of falling margins M_j(x); all if not given.
        anchor: where the η_j start; each class draws its own.
        mode: 'train' or 'eval', the mode in which attack passes see the model.

    Raises:
        InputError: where steps or step is not positive, and from :meth:`solve`, where the model has fewer than two
            outputs.
    """

    constraint: Constraint
    attack_loss: AnyLoss = minus(negative_margin)  # noqa: RUF009 (stateless)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.RMSprop
    steps: int = 30
    step: float = 2 / 255
    keep: Literal["best", "all"] = "best"
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    ranks: range | None = None
    anchor: Anchor | str = "uniform"
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        whole_number("steps", self.steps, 1)
        positive("step", self.step)
        one_of("keep", self.keep, ("best", "all"))
        self.anchor = anchor_policy(self.anchor)

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Batch:
        """A row for each example and class aimed at; a batch that has targets already is aimed at those alone."""
        targets, classes = self._targets(model, batch)
        each = targets.shape[1]
        wide = batch.repeat(each).replace(target=targets.flatten(), aims=targets.repeat_interleave(each, 0))
        if wide.index is not None and "aims" not in batch.more:
            # What is remembered is remembered per example and class; a batch that has been here says so by its rows.
            examples = None if wide.examples is None else wide.examples * classes
            wide = wide.replace(index=wide.index * classes + targets.flatten(), examples=examples)
        return super().prepare(model, wide, generator)

    def _targets(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The classes aimed at, ``[B, T]``, and how many there are."""
        with attack_mode(model, "eval"), no_graph():
            out = model(batch.x)
        classes = int(out.shape[-1])
        if classes < 2:
            raise InputError(f"the model has {classes} output; a targeted attack needs at least 2 classes")
        if "target" in batch.more:
            return batch.more["target"][:, None], classes
        y = check_classes(out, batch)
        if self.ranks is None:
            return other_classes(y, classes), classes
        others = out.scatter(1, y[:, None], -torch.inf)  # margins without f_y, which orders nothing
        chosen = others.argsort(1, descending=True)[:, : classes - 1][:, self.ranks.start : self.ranks.stop]
        if chosen.shape[1] == 0:
            raise InputError(f"ranks are {self.ranks}; the model has {classes - 1} classes to aim at, from 0 on")
        return chosen, classes

    def objective(self, model: nn.Module, batch: Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        """ℓ_atk ``[rows of δ]``."""
        return self.attack_loss(model, batch, delta)

    def solve_at(self, model: nn.Module, batch: Batch, anchor: Tensor, differentiable: bool) -> Solution:
        """The perturbations and their targets. ``anchor`` has a row for each row of ``batch``, or for each example.

        A batch that has targets is aimed at those alone: ``solve(model, solution.batch, solution.anchor)`` gives
        ``solution`` again.
        """
        rows = len(batch) // len(anchor)
        z = anchor.repeat_interleave(rows, 0) if rows > 1 else anchor
        eta = nn.Parameter(z.clone())
        optimizer = self.optimizer([eta], lr=self.step)
        schedule = None if self.schedule is None else self.schedule(optimizer)
        with torch.no_grad():
            base = self.base(model, batch)

        def closure() -> Tensor:
            total = self.attack_loss(model, batch, eta).sum()
            (eta.grad,) = torch.autograd.grad(total, eta)
            return total.detach()

        for _ in range(self.steps):
            optimizer.step(closure)  # type: ignore[arg-type]  # torch types the closure as returning float
            eta.data = self.constraint.project(eta.data, base)
            if schedule is not None:
                schedule.step()
        solution = Solution(eta.detach(), z, batch)
        if self.keep == "best":
            solution = self._best(model, solution)
        if not differentiable:
            return solution
        gradient = objective_gradient(self, model, solution.batch, solution.delta, solution.anchor)
        return replace(solution, gradient=gradient)

    def _best(self, model: nn.Module, solution: Solution) -> Solution:
        """The row of the least attack loss of each example, whose rows are side by side."""
        batch = solution.batch
        each = batch.more["aims"].shape[1]
        with no_graph():
            values = self.attack_loss(model, batch, solution.delta).reshape(-1, each)
        best = values.argmin(1)
        rows = torch.arange(len(best), device=best.device) * each + best
        return Solution(solution.delta[rows], solution.anchor[rows], batch[rows])
