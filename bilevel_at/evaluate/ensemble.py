"""AutoAttack (Croce and Hein, 2020) and its parts, through pyautoattack.

Each part is a stage of its own, run with the settings it has in the version of AutoAttack it belongs to, on the images
that the parts before it left standing: in that order, with the same batches and the same seed, this is what
``pyautoattack.AutoAttack.run_standard_evaluation`` does. It can be interrupted between any two batches, because the
state is saved by this library; pyautoattack 0.2.0 cannot read back the file that it writes.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import InputError

__all__ = ["COMPONENTS", "VERSIONS", "Component"]

COMPONENTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
VERSIONS = {
    "autoattack": ("standard", ("apgd-ce", "apgd-t", "fab-t", "square")),
    "autoattack-plus": ("plus", ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")),
    "autoattack-rand": ("rand", ("apgd-ce", "apgd-dlr")),
}
_LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # the number of classes that the losses compare


@dataclass(frozen=True)
class Component:
    """One part of AutoAttack: ``part`` of ``version``, in the ``norm`` ball of radius ``epsilon`` around [0, 1] images.

    Args:
        part: the name of the part, one of :data:`COMPONENTS`.
        norm: "linf" or "l2".
        epsilon: the radius.
        version: of AutoAttack, which determines the settings.
        seed: the seed of every batch, as in pyautoattack.
        queries: of the square attack, 5,000 if None.
    """

    part: str
    norm: str
    epsilon: float
    version: str = "standard"
    seed: int = 0
    queries: int | None = None

    @property
    def name(self) -> str:
        return self.part

    def rows(self, classes: int) -> int:
        return 1

    def passes(self, classes: int) -> int:
        targets = min(9, classes - 1) if self.part in ("apgd-t", "fab-t") else 1
        starts = 5 if self.version == "plus" and targets == 1 else 1
        averaged = 20 if self.version == "rand" else 1
        queries = 5_000 if self.queries is None else self.queries
        # A query is a forward pass, a third of a gradient; the others take 100 iterations.
        return queries // 3 if self.part == "square" else 100 * targets * starts * averaged

    def check(self, batch: Batch, classes: int) -> None:
        """Check that the network and the batch suit this part.

        Args:
            batch: the first batch.
            classes: of the network.

        Raises:
            InputError: if the network has too few classes for the loss, or inputs of the square attack are not images.
        """
        if classes < _LEAST_CLASSES.get(self.part, 2):
            raise InputError(
                f"attack {self.part} needs a network of at least {_LEAST_CLASSES.get(self.part, 2)} classes, and this "
                f"one has {classes}; apgd-ce, fab-t and square take any"
            )
        if self.part == "square" and batch.x.ndim != 4:
            raise InputError(f"attack square changes squares of images [B, C, H, W]; inputs are {list(batch.x.shape)}")

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        from pyautoattack import AutoAttack

        with torch.no_grad():
            classes = model(batch.x[:1]).shape[-1]
        self.check(batch, classes)
        norm = {"linf": "Linf", "l2": "L2"}[self.norm]
        attack = AutoAttack(
            model, norm=norm, eps=self.epsilon, version=self.version, seed=self.seed, device=batch.x.device
        )
        attack.attacks_to_run = [self.part]
        for targeted in (attack.apgd_targeted, attack.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        if self.queries is not None:
            attack.square.n_queries, attack.square.resc_schedule = self.queries, True
        tracer = sys.gettrace()  # pyautoattack unsets the trace function of debuggers
        devices = [batch.x.device] if batch.x.is_cuda else []
        logger, level = attack.logger, attack.logger.level
        logger.setLevel(logging.ERROR)  # its warnings on masking: this package has checks of its own
        try:
            with torch.random.fork_rng(devices):
                attacked, _ = attack.run_standard_evaluation(batch.x, batch.y, batch_size=len(batch))
        finally:
            logger.setLevel(level)
            sys.settrace(tracer)
        result: Tensor = attacked.detach()
        return result
