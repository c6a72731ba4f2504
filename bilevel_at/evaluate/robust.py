"""Which predictions survive an attack."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..data import ImageSet
from ..modes import attack_mode
from .attacks import Attack

__all__ = ["Score", "evaluate", "robust_correct"]


@dataclass(frozen=True)
class Score:
    """An accuracy and what it was measured with. data: the fingerprint of the images, its first 16 digits."""

    accuracy: float
    n: int
    epsilon: float
    seconds: float
    data: str = ""

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def robust_correct(
    model: nn.Module, images: ImageSet, attack: Attack, *, seed: int = 0, batch_size: int = 512
) -> Tensor:
    """Whether each example is still classified correctly under the worst of the attack's restarts, ``[N]`` bool.

    Examples already broken are not attacked again. The model is seen in eval mode and left as it was.
    """
    device = images.device
    generator = torch.Generator(device).manual_seed(seed)
    with attack_mode(model, "eval"):

        def correct(batch: Batch, delta: Tensor) -> Tensor:
            with torch.no_grad():
                return model(batch.x + delta).argmax(1) == batch.y

        standing = torch.zeros(len(images), dtype=torch.bool, device=device)
        for rows in torch.arange(len(images), device=device).split(batch_size):
            batch = Batch(images[rows].pixels(), images.y[rows])
            standing[rows] = correct(batch, torch.zeros_like(batch.x))
        if attack.lower is None:
            return standing
        for _ in range(attack.restarts):
            for rows in standing.nonzero().flatten().split(batch_size):
                batch = Batch(images[rows].pixels(), images.y[rows])
                solution = attack.lower.solve(model, batch, generator=generator)
                standing[rows] = correct(batch, solution.delta)
        return standing


def evaluate(
    model: nn.Module,
    images: ImageSet,
    attacks: Sequence[Attack],
    *,
    seed: int = 0,
    batch_size: int = 512,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Score]:
    """The accuracy under each attack, by its name. ``progress`` is told each name before it starts."""
    scores, data = {}, images.sha256()[:16]
    for attack in attacks:
        progress(attack.name)
        start = time.perf_counter()
        accuracy = robust_correct(model, images, attack, seed=seed, batch_size=batch_size).float().mean().item()
        scores[attack.name] = Score(accuracy, len(images), attack.epsilon, time.perf_counter() - start, data)
    return scores
