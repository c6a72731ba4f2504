"""What a random start does to the length of an FGSM perturbation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..constraints import LinfBall
from ..data import ImageSet
from ..division import divided
from ..errors import InputError, positive, whole_number
from ..losses import cross_entropy, input_gradient
from ..modes import attack_mode

__all__ = ["RandomStepNorms", "lemma_1", "random_step_norm"]


def lemma_1(epsilon: float, step: float, dimension: int) -> float:
    """√d · √(−α³/(6ε) + α²/2 + ε²/3), for a step α in 0 … 2ε in d dimensions.

    This is √E‖δ‖₂² of δ = P(η + α s), P the projection onto [−ε, ε]^d and η uniform in it, where each sign s_i is
    independent of η_i, and so bounds E‖δ‖₂: from √(d/3) ε at α = 0 up to √d ε, which is FGSM's, at α = 2ε. A network's
    s = sign ∇_x ℓ(x + η) does depend on η: where the loss curves upwards s_i leans towards the sign of η_i, and E‖δ‖₂
    may exceed it.

    Raises :class:`InputError` where ε is not positive, α outside 0 … 2ε, or d not a whole number from 1.
    Source: Andriushchenko and Flammarion (2020), Lemma 1.
    """
    positive("epsilon", epsilon)
    whole_number("dimension", dimension, 1)
    # A step of 2ε that was computed otherwise may be a rounding away.
    if not -1e-9 * epsilon <= step <= (2 + 1e-9) * epsilon:
        raise InputError(f"step is {step:g}; Lemma 1 holds for steps from 0 to 2 epsilon = {2 * epsilon:g}")
    square = -(step**3) / (6 * epsilon) + step**2 / 2 + epsilon**2 / 3
    return math.sqrt(dimension * square)


@dataclass(frozen=True)
class RandomStepNorms:
    """The length of FGSM-RS perturbations on a network, by step.

    epsilon: ε. dimension: d. steps: α, ``[A]``. draws: starts per example.
    mean: the mean of ‖δ‖₂ over examples and draws, ``[A]``; error: its standard error, ``[A]``, from the spread of the
        examples' own means.
    square: the mean of ‖δ‖₂², ``[A]``. bounded: whether x + δ was kept in the input range.
    """

    epsilon: float
    dimension: int
    steps: Tensor
    mean: Tensor
    error: Tensor
    square: Tensor
    draws: int
    bounded: bool

    def bound(self) -> Tensor:
        """Lemma 1 at each step, ``[A]``."""
        return torch.tensor([lemma_1(self.epsilon, s, self.dimension) for s in self.steps.tolist()])


def random_step_norm(
    model: nn.Module,
    images: ImageSet,
    epsilon: float,
    steps: Sequence[float] | None = None,
    *,
    seed: int = 0,
    draws: int = 10,
    bounds: tuple[float, float] | None = None,
    batch_size: int = 512,
) -> RandomStepNorms:
    """E‖δ_FGSM-RS‖₂ by Monte Carlo: δ = P_C(η + α sign ∇_x ℓ(x + η)), η ~ U(C), on the network's own gradients.

    steps: the α's, in 0 … 2ε; nine from 0 to 2ε, 1.25 ε among them, if not given. draws: starts η for each example, the
    same ones for every α. bounds: the input range, None for none, as in Lemma 1; with (0, 1) η and δ stay inside it.
    The model is seen in eval mode and left as it was. Several processes share the draws of the batches.

    Raises :class:`InputError` for an ε that is not positive, a step outside 0 … 2ε, no images, or too few draws.
    Source: Andriushchenko and Flammarion (2020), Lemma 1 and figure 2.
    """
    whole_number("draws", draws, 1)
    if len(images) == 0:
        raise InputError("there are no images to measure FGSM-RS on; at least one is needed")
    sizes = [epsilon * part / 4 for part in range(9)] if steps is None else list(steps)
    dimension = math.prod(images.shape)
    for size in sizes:
        lemma_1(epsilon, size, dimension)  # says what is out of range
    ball, generator = LinfBall(epsilon, bounds), torch.Generator(images.device).manual_seed(seed)

    def starts() -> Iterator[tuple[Tensor, Batch, Tensor]]:
        for rows in torch.arange(len(images), device=images.device).split(batch_size):
            batch = Batch(images[rows].pixels(), images.y[rows])
            for _ in range(draws):
                yield rows, batch, ball.sample(batch.x, generator)

    def norms(part: tuple[Tensor, Batch, Tensor]) -> tuple[Tensor, Tensor]:
        rows, batch, start = part
        sign = input_gradient(cross_entropy, model, batch, start)[0].sign()
        deltas = (ball.project(start + size * sign, batch.x) for size in sizes)
        squares = torch.stack([delta.double().flatten(1).square().sum(1) for delta in deltas], 1)
        return rows, torch.stack([squares.sqrt(), squares], 2)

    total = torch.zeros(len(images), len(sizes), 2, dtype=torch.float64, device=images.device)
    with attack_mode(model, "eval"):
        for rows, squares in divided(norms, starts()):
            total[rows.to(images.device)] += squares.to(images.device)
    each = (total / draws).cpu()
    lengths = each[..., 0]
    spread = lengths.std(0) if len(images) > 1 else torch.full((len(sizes),), torch.nan)
    return RandomStepNorms(
        epsilon=float(epsilon),
        dimension=dimension,
        steps=torch.tensor(sizes, dtype=torch.float64),
        mean=lengths.mean(0),
        error=spread / math.sqrt(len(images)),
        square=each[..., 1].mean(0),
        draws=draws,
        bounded=bounds is not None,
    )
