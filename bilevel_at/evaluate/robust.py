"""The outcome of an attack for each example, in a record from which an interrupted attack resumes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import shares
from ..batch import Batch
from ..data import ImageSet
from ..data.sets import check_images
from ..division import divided
from ..errors import BilevelError, InputError
from ..modes import attack_mode
from .attacks import Attack
from .ensemble import Component
from .stages import OnSurrogate, Stage

__all__ = ["Trace", "attack_examples", "attacked", "robust_correct"]

STANDING = -1
PICTURED = 8  # examples whose attacked images a trace keeps
CLOSE_ENOUGH = 1e-5  # tolerance for rounding of a perturbation, on images in [0, 1]


@dataclass
class Trace:
    """The state of an attack on ``n`` examples.

    Args:
        broken: ``[n]`` int16, the stage that broke the example; 0 if the clean image is misclassified, −1 if it is not
            broken.
        said: ``[n]`` int64, the predicted class of the image that broke the example, or else of the clean image.
        stage: the stage of the next batch.
        batch: the next batch of the stage.
        seconds: the time so far.
        outside: the number of misclassified images outside C(x), which do not count as broken.
        pictured: the first examples as the last stage that attacked them left them, for a figure; None in a trace that
            was read from a file.
    """

    broken: Tensor
    said: Tensor
    stage: int = 0
    batch: int = 0
    seconds: float = 0.0
    outside: int = 0
    pictured: Tensor | None = None

    @classmethod
    def start(cls, n: int, device: torch.device | str = "cpu") -> Trace:
        broken = torch.full((n,), STANDING, dtype=torch.int16, device=device)
        return cls(broken, torch.full((n,), -1, dtype=torch.int64, device=device))

    @property
    def correct(self) -> Tensor:
        """``[n]`` bool: classified correctly under all stages so far."""
        return self.broken == STANDING

    def rows(self) -> Tensor:
        """The indices of the examples of the current stage, including those that it has broken."""
        return ((self.broken == STANDING) | (self.broken >= self.stage)).nonzero().flatten()

    def to(self, device: torch.device | str) -> Trace:
        """The trace on another device."""
        pictured = None if self.pictured is None else self.pictured.to(device)
        return replace(self, broken=self.broken.to(device), said=self.said.to(device), pictured=pictured)

    def take(self, outcome: Outcome) -> None:
        """Enter what the current stage has done to a batch."""
        fell, said, rows, answer, pictured = (part.to(self.broken.device) for part in outcome[:5])
        self.outside += outcome.outside
        # In one statement, so that an interruption leaves a consistent trace.
        self.broken[fell], self.said[fell] = self.stage, said
        if self.stage == 0:
            self.said[rows] = answer
        if self.pictured is None and self.stage == self.batch == 0:
            self.pictured = pictured.new_zeros(min(PICTURED, len(self.broken)), *pictured.shape[1:])
        if self.pictured is not None:
            self.pictured[rows[: len(pictured)]] = pictured

    def arrays(self) -> dict[str, Any]:
        """The trace as plain arrays for a file, the inverse of :meth:`from_arrays`."""
        return {
            "broken": self.broken.cpu().numpy(),
            "said": self.said.cpu().numpy(),
            "position": np.array([self.stage, self.batch, self.outside]),
            "seconds": np.array(self.seconds),
        }

    @classmethod
    def from_arrays(cls, arrays: Any, device: torch.device | str = "cpu") -> Trace:
        """Make a trace from the arrays of :meth:`arrays`.

        Args:
            arrays: the arrays by name.
            device: of the trace.

        Raises:
            KeyError: if an array is missing.
            ValueError: if shapes or types are wrong.
        """
        broken, answers = (torch.from_numpy(arrays[name]).to(device) for name in ("broken", "said"))
        stage, batch, outside = (int(v) for v in arrays["position"])
        if broken.shape != answers.shape or broken.dtype != torch.int16 or answers.dtype != torch.int64:
            raise ValueError("arrays of other shapes or types")
        return cls(broken, answers, stage, batch, float(arrays["seconds"]), outside)


class Outcome(NamedTuple):
    """What a stage has done to a batch.

    fell: the indices of the examples that it has broken. said: their predicted classes.
    rows, answer: the indices of all examples of the batch, and the predicted classes of the attacked images.
    pictured: the attacked images of those examples that a trace keeps, which are the first of the batch.
    outside: the number of misclassified images outside C(x).
    seconds: the time it took.
    """

    fell: Tensor
    said: Tensor
    rows: Tensor
    answer: Tensor
    pictured: Tensor
    outside: int
    seconds: float


@dataclass
class _Clean:
    """Stage 0: the images as they are."""

    name: str = field(default="clean", init=False)

    def rows(self, classes: int) -> int:
        return 1

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        return batch.x


def attack_examples(
    model: nn.Module,
    images: ImageSet,
    attack: Attack,
    *,
    seed: int = 0,
    batch_size: int = 250,
    trace: Trace | None = None,
) -> Iterator[tuple[Trace, str, int, int]]:
    """Attack the examples stage by stage, each stage on the examples that earlier stages have not broken.

    Random draws depend on ``(seed, stage, batch)`` only: an attack resumed from a saved ``trace`` gives the same result
    as an uninterrupted one. The model is evaluated in eval mode; its mode is restored.

    Several processes (:func:`bilevel_at.shares.together`) take the batches of a stage in rounds, one each, and give the
    same result as one process. After each round all have the same trace.

    Args:
        model: the network.
        images: the examples.
        attack: the attack.
        seed: of all random draws.
        batch_size: images in a batch.
        trace: the state to resume from; it is updated in place.

    Yields:
        After each batch, or round: the trace, the stage's name, the batches done in the stage, the batches of the
        stage.

    Raises:
        InputError: if values of ``images`` are not in [0, 1], ``batch_size`` is not positive, or the network does not
            give a row of logits per image.
        BilevelError: if logits of clean images are not finite.
        Elsewhere: if another process has raised an error; that one raises the error itself.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    trace = Trace.start(len(images), images.device) if trace is None else trace
    stages: list[Stage] = [_Clean(), *attack.stages]
    while trace.stage < len(stages):
        stage = stages[trace.stage]
        todo = trace.rows()
        parts = todo.split(max(1, batch_size // stage.rows(images.classes))) if len(todo) else ()
        compute = partial(_attack_batch, model, images, attack, stage, trace.stage, seed)
        while trace.batch < len(parts):
            ahead = range(len(parts))[trace.batch : trace.batch + shares.count()]
            outcomes = divided(compute, [(number, parts[number]) for number in ahead])
            for outcome in outcomes:
                trace.take(outcome)
            trace.batch += len(outcomes)
            trace.seconds += max(outcome.seconds for outcome in outcomes)  # a round takes as long as its slowest batch
            yield trace, stage.name, trace.batch, len(parts)
        trace.stage, trace.batch = trace.stage + 1, 0


def _attack_batch(
    model: nn.Module,
    images: ImageSet,
    attack: Attack,
    stage: Stage,
    place: int,
    seed: int,
    part: tuple[int, Tensor],
) -> Outcome:
    """The outcome of stage ``place`` on a batch, which is given by its number and the indices of its examples."""
    start = time.perf_counter()
    number, rows = part
    generator = torch.Generator(images.device)
    generator.manual_seed(((1_000_003 * seed + place) * 1_000_003 + number) % 2**63)
    # Set for each batch, because callers may change the modes between batches.
    with attack_mode(model, "eval"), torch.inference_mode(False):
        batch = Batch(images[rows].pixels(), images.y[rows])
        moved = stage(model, batch, generator)
        with torch.no_grad():
            out = model(moved)
    if place == 0:
        _look(batch, out)
        for later in attack.stages if number == 0 else ():
            if isinstance(later, (Component, OnSurrogate)):
                later.check(batch, out.shape[1])
    answer = out.argmax(1)
    wrong, outside = answer != batch.y, 0
    if attack.constraint is not None and place > 0:
        delta = moved - batch.x
        distance = (delta - attack.constraint.project(delta, batch.x)).flatten(1).abs().amax(1)
        inside = distance <= CLOSE_ENOUGH  # False for NaN
        outside = int((wrong & ~inside).sum())
        wrong &= inside
    fell, said = rows[wrong], answer[wrong]  # waits for the device
    pictured = moved[: int((rows[:PICTURED] < PICTURED).sum())].detach()  # rows are sorted
    return Outcome(fell, said, rows, answer, pictured, outside, time.perf_counter() - start)


def _look(batch: Batch, out: Any) -> None:
    """Check the logits and the clean images before any attack."""
    shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(batch):
        raise InputError(f"the model's output is {shape}; logits are a tensor of shape [{len(batch)}, classes]")
    assert batch.y is not None
    check_images(batch.x, batch.y, out.shape[1])
    if not (finite := out.logsumexp(1).isfinite()).all():  # −∞ rules a class out, and is a logit
        rows = (~finite).nonzero().flatten().tolist()
        raise BilevelError(
            f"the network's logits are not finite on {len(rows)} of {len(out)} clean images, so there is no accuracy",
            rows,
        )


def attacked(model: nn.Module, images: ImageSet, attack: Attack, *, seed: int = 0, batch_size: int = 250) -> Trace:
    """:func:`attack_examples` to its end."""
    trace = Trace.start(len(images), images.device)
    for _ in attack_examples(model, images, attack, seed=seed, batch_size=batch_size, trace=trace):
        pass
    return trace


def robust_correct(
    model: nn.Module, images: ImageSet, attack: Attack, *, seed: int = 0, batch_size: int = 512
) -> Tensor:
    """Whether each example is classified correctly under every stage of the attack.

    The model is evaluated in eval mode; its mode is restored.

    Args:
        model: the network.
        images: the examples.
        attack: the attack; its stages skip examples that are broken already.
        seed: of all random draws.
        batch_size: images in a batch.

    Returns:
        ``[N]`` bool.

    Raises:
        InputError: as :func:`attack_examples`.
    """
    return attacked(model, images, attack, seed=seed, batch_size=batch_size).correct
