"""SSAT (Kim et al., 2021): FGSM from a random start, shortened to the first length that changes the prediction.

    min_θ  mean_i ℓ_CE(θ, t_i δ_i),      δ = P_C(z + step · sign ∇_δ ℓ_CE(θ, z)),   z = clip(u), u ~ U[−ε, ε]^d
    t_i = 0 where the prediction at z_i is wrong;
          else the least k/c, k = 1, …, c − 1, at which the prediction at (k/c) δ_i is wrong;   else 1

t δ is no minimiser of the linearised objective and has no derivative in θ, so KKT solvers refuse the problem.

Published settings (the authors' code): c = 3, step 10/255 at ε = 8/255, which is 1.25 ε; attack and checkpoints in eval
mode, training in train mode; 200 epochs of batch 128, rate 0.01 divided by 10 after 60, 120 and 160, weight decay 5e-4;
or 30 epochs with rate 0 → 0.3 → 0. The paper asks whether the prediction at the image itself is wrong, the code at the
noisy start z, which costs no pass (``--ask clean``: as the paper). ATAS' paper (Table I, ResNet-18) reports clean
88.83 %, PGD-50 38.99 %, AutoAttack 37.06 %; at ε = 16/255 0.00 %. ``--mode train --label-smoothing 0.4`` is the setting
of the FastAT benchmark: 84.80 %, 51.46 %, 38.33 %, the widest gap between the two attacks in its table.

When to use it: where clean accuracy counts more than robust accuracy. Evaluate it with AutoAttack: PGD alone flatters
it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.batch import on_host, per_sample
from bilevel_at.errors import one_of, whole_number
from bilevel_at.losses import check_classes
from bilevel_at.modes import Mode, no_graph
from bilevel_at.problems.fastat import Draw, uniform
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe

Ask = Literal["start", "clean"]


@dataclass(eq=False)
class Shortened(ba.Linearized):
    """The linearised attacker's δ times t_i, the least of 0, 1/c, …, 1 at which the prediction is wrong, else 1.

    Args:
        checkpoints: c, at least 1.
        ask: t_i is 0 where the prediction is wrong at the start z, or at the clean image.
    """

    checkpoints: int = 3
    ask: Ask = "start"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("checkpoints", self.checkpoints, 1)
        one_of("ask", self.ask, ("start", "clean"))
        self.keep_output = self.ask == "start"

    def solve_at(self, model: nn.Module, batch: ba.Batch, anchor: Tensor, differentiable: bool) -> ba.Solution:
        """t δ, without a derivative.

        A checkpoint's pass is of the examples that are still right, as published, where batch statistics depend on that
        or a look costs nothing; on a GPU in eval mode it is of all examples, which gives the same lengths without a
        wait.
        """
        solution = super().solve_at(model, batch, anchor, False)
        with no_graph():
            first = solution.output if self.ask == "start" else model(batch.x)
            right = first.argmax(1) == check_classes(first, batch)
            lengths = self._of_those_left if model.training or on_host(right) else self._of_all
            length = lengths(model, batch, solution.delta, right)
        return replace(solution, delta=per_sample(length, solution.delta) * solution.delta, kept_output=None)

    def _of_those_left(self, model: nn.Module, batch: ba.Batch, delta: Tensor, right: Tensor) -> Tensor:
        """t ``[B]``. In train mode the last one left is seen with all others: it may have no batch statistics."""
        length, left = right.to(delta), right.nonzero().squeeze(1)
        for k in range(1, self.checkpoints):
            if len(left) == 0:
                break
            seen, share = left, k / self.checkpoints
            if len(left) == 1 and model.training:
                seen = torch.arange(len(batch), device=delta.device)
            rows = batch[seen]
            wrong = model(rows.x + share * delta[seen]).argmax(1) != rows.y
            wrong = wrong[torch.isin(seen, left)]
            length[left[wrong]] = share
            left = left[~wrong]
        return length

    def _of_all(self, model: nn.Module, batch: ba.Batch, delta: Tensor, right: Tensor) -> Tensor:
        """t ``[B]``, every checkpoint of every example."""
        length = right.to(delta)
        for k in range(1, self.checkpoints):
            share = k / self.checkpoints
            wrong = model(batch.x + share * delta).argmax(1) != batch.y
            length = torch.where(right & wrong, share, length)
            right = right & ~wrong
        return length


def problem(
    epsilon: float = 8 / 255,
    checkpoints: int = 3,
    ask: Ask = "start",
    step: float | None = None,
    draw: Draw = "cube",
    label_smoothing: float = 0.0,
    mode: Mode = "eval",
) -> ba.BilevelProblem:
    """One sign step from a uniform draw in an ℓ∞ ball, shortened.

    Args:
        epsilon: radius ε of the ball.
        checkpoints: c; the lengths tried are 1/c, 2/c, …, 1.
        ask: the perturbation is 0 where the prediction is wrong at the start of the attack, or at the clean image.
        step: length of the sign step, 1.25 ε if not given.
        draw: a uniform start is drawn in the cube [−ε, ε]^d and then clipped to the input range, or in the set C.
        label_smoothing: of the attack's and the training loss, in [0, 1].
        mode: train or eval batch statistics in attack passes.
    """
    loss, step = ba.CrossEntropy(label_smoothing), 1.25 * epsilon if step is None else step
    lower = Shortened(
        ba.minus(loss),
        ba.LinfBall(epsilon),
        uniform(epsilon, draw),
        "sign",
        step,
        mode,
        checkpoints=checkpoints,
        ask=ask,
    )
    return ba.BilevelProblem(ba.UpperProblem(loss), lower)


def recipe() -> dict[str, Recipe]:
    cifar = replace(CIFAR, epochs=200, lr=0.01, schedule="multistep", milestones=(60, 120, 160))
    return {"digits": DIGITS, "cifar10": cifar}
