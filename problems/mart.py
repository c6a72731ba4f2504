"""MART (Wang et al., 2020): boosted cross-entropy, and a divergence weighted by how unsure the network is of x.

    f = BCE(p(x + δ*), y) + weight · KL(p(x) ‖ p(x + δ*)) · (1 − p_y(x))
    BCE(p, y) = −log p_y − log(1 − max_{k≠y} p_k)
    δ* ≈ argmax_{δ ∈ C} ℓ_CE(θ, δ),   K sign steps from N(0, 0.001² I)

with p = softmax(f_θ) (section 3). Gradients in θ go through every p. The attack is min-max training's.

Published settings (section 4 and the authors' code): ε = 0.031, step 0.007, K = 10, weight 5, attacks in eval mode,
from a start that is not projected onto C (``--clip-start``: is); ResNet-18, 120 epochs of batch 128, rate 0.01
divided by 10 from epochs 75, 90 and 100 on, weight decay 3.5e-3. Here ε = 8/255 and step 2/255, which are those
numbers in their usual units. On the digits K = 7 and step ε/4, as for min-max training.

Small constants of the authors' code keep its logarithms finite: 1.0001 − p_k + 1e-12 for 1 − p_k, p(x + δ) + 1e-12 in
the divergence, 1.0000001 − p_y(x); ``--exact`` computes the formulas above without them, through log-softmax. The
code's pass over x comes before that over x + δ (``--no-clean-first``: after), which matters to batch normalisation's
running statistics alone.

When to use it: as trades.py, where examples that are misclassified are to count for more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.errors import at_least
from bilevel_at.losses import check_classes
from bilevel_at.modes import Mode
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.solvers import ZeroIG


def second_term(out: Tensor, y: Tensor) -> Tensor:
    """−log(1 − max_{k≠y} p_k) from logits ``[B, K]``, ``[B]``.

    1 − p_k is Σ_{j≠k} p_j, whose logarithm is a logsumexp: finite where 1 − p_k rounds to 0.
    """
    log_p = F.log_softmax(out, 1)
    label = F.one_hot(y, out.shape[1]).bool()
    rival = out.masked_fill(label, -torch.inf).argmax(1, keepdim=True)
    others = log_p.masked_fill(torch.zeros_like(label).scatter(1, rival, True), -torch.inf)
    return -others.logsumexp(1)


def published_second_term(out: Tensor, y: Tensor) -> Tensor:
    """−log(1.0001 − max_{k≠y} p_k + 1e-12), ``[B]``, as the authors' code has it."""
    label = F.one_hot(y, out.shape[1]).bool()
    rival = F.softmax(out, 1).masked_fill(label, -torch.inf).amax(1)
    return -(1.0001 - rival + 1e-12).log()


class Misclassification(ba.UpperProblem):
    """f = BCE(p(x + δ), y) + weight · KL(p(x) ‖ p(x + δ)) · (1 − p_y(x)), ``[B]``.

    BCE(p, y) = −log p_y − log(1 − max_{k≠y} p_k), the boosted cross-entropy.

    Args:
        weight: at least 0.
        exact: without the authors' constants.
        clean_first: the order of the two passes.
        criterion: the first term of BCE.
    """

    def __init__(
        self,
        weight: float,
        exact: bool = False,
        clean_first: bool = True,
        criterion: ba.CrossEntropy = ba.cross_entropy,
    ) -> None:
        self.weight, self.exact, self.clean_first = at_least("weight", weight), exact, clean_first
        self.criterion: ba.CrossEntropy = criterion

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        zero = torch.zeros_like(batch.x)
        clean = ba.logits(model, batch, zero) if self.weight and self.clean_first else None
        moved = ba.logits(model, batch, solution.delta)
        y = check_classes(moved, batch)
        second = second_term(moved, y) if self.exact else published_second_term(moved, y)
        boosted = self.criterion.value(moved, batch) + second
        if self.weight == 0:
            return boosted
        clean = ba.logits(model, batch, zero) if clean is None else clean
        log_clean = F.log_softmax(clean, 1)
        if self.exact:
            divergence = F.kl_div(F.log_softmax(moved, 1), log_clean, reduction="none", log_target=True).sum(1)
        else:
            log_moved = (F.softmax(moved, 1) + 1e-12).log()
            divergence = F.kl_div(log_moved, log_clean.exp(), reduction="none").sum(1)
        unsure = (1 if self.exact else 1.0000001) - log_clean.gather(1, y[:, None]).squeeze(1).exp()
        return boosted + self.weight * divergence * unsure


def problem(
    epsilon: float = 8 / 255,
    weight: float = 5.0,
    steps: int = 10,
    step: float | None = None,
    clip_start: bool = False,
    exact: bool = False,
    clean_first: bool = True,
    label_smoothing: float = 0.0,
    mode: Mode = "eval",
) -> ba.BilevelProblem:
    """K sign steps up the cross-entropy in an ℓ∞ ball.

    Args:
        epsilon: radius ε of the ball.
        weight: of the divergence, λ in the paper.
        steps: K, the number of sign steps.
        step: length of a sign step, ε/4 if not given.
        clip_start: project the start onto C before its first gradient.
        exact: compute the loss without the constants of the authors' code.
        clean_first: pass x through the network before x + δ.
        label_smoothing: share of the label that is spread over all classes, for both players.
        mode: train or eval batch statistics in attack passes.
    """
    step = epsilon / 4 if step is None else step
    start, ball = ba.Gaussian(1e-3, clip=clip_start), ba.LinfBall(epsilon)
    loss = ba.CrossEntropy(label_smoothing)
    lower = ba.Linearized.pgd(ba.minus(loss), ball, steps, step, start, mode=mode)
    return ba.BilevelProblem(Misclassification(weight, exact, clean_first, loss), lower)


def solver() -> ZeroIG:
    return ZeroIG()


def recipe() -> dict[str, Recipe]:
    cifar = replace(
        CIFAR,
        model="resnet18",
        epochs=120,
        lr=0.01,
        weight_decay=3.5e-3,
        schedule="multistep",
        milestones=(74, 89, 99),
    )
    return {"digits": DIGITS.playing(steps=7), "cifar10": cifar}
