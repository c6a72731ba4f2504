"""How to train: the published settings of a method on a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..data.loader import Augment
from ..errors import InputError, whole_number

__all__ = ["CIFAR", "DEFAULTS", "DIGITS", "IMAGENET", "Recipe", "Schedule", "recipe_for"]

Schedule = Literal["linear", "multistep", "constant"]


@dataclass(frozen=True)
class Recipe:
    """SGD settings, and the arguments of ``problem(...)`` that differ from its defaults on this data set.

    Args:
        model: network by name; "file" is the problem file's own model(shape, classes).
        epochs: passes over the training set.
        batch_size: examples in a batch.
        accumulate: batches whose gradients make one step.
        replays: updates of θ made on each batch before the next one (Free-AT's m).
        lr: peak learning rate.
        schedule: "linear" goes 0 → lr over the first half of all steps and back to 0; "multistep" divides by 10 after
            each epoch of the milestones; "constant" stays.
        milestones: epochs after which "multistep" divides the rate by 10.
        momentum: of SGD.
        peak_momentum: with schedule "linear", the momentum at the peak of the rate; momentum changes linearly from
            ``momentum`` to it and back, as the rate rises and falls. None, or any other schedule: constant momentum.
        weight_decay: of SGD.
        augment: none; crop-flip, a random crop (padding 4) and flip; or resized-crop-flip, for streamed images.
        ema: decay of an exponential moving average of the weights, which is evaluated and saved instead; 0 for none.
        problem: arguments of ``problem(...)``.

    Raises:
        InputError: if a number is out of range.
    """

    model: str = "small_cnn"
    epochs: int = 30
    batch_size: int = 128
    accumulate: int = 1
    replays: int = 1
    lr: float = 0.1
    schedule: Schedule = "linear"
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    peak_momentum: float | None = None
    weight_decay: float = 5e-4
    augment: Augment = "none"
    ema: float = 0.0
    problem: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "replays"):
            whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        if self.replays > 1 and self.accumulate > 1:
            raise InputError(f"--replays is {self.replays} and --accumulate {self.accumulate}; one of them must be 1")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"--lr is {self.lr:g}; it must be a positive number")
        if self.schedule != "linear":
            object.__setattr__(self, "peak_momentum", None)  # so that the recorded value is the one in effect
        for name in ("momentum", "peak_momentum", "weight_decay"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name):g}; it must be at least 0")
        later = [b > a for a, b in zip((0, *self.milestones), self.milestones, strict=False)]
        if not all(later):
            raise InputError(f"--milestones are {self.milestones}; they must be epochs in order, from 1 on")
        if self.schedule == "multistep" and not self.milestones:
            raise InputError(
                "--schedule multistep needs --milestones, the epochs after which the rate is divided by 10"
            )
        if not 0 <= self.ema < 1:
            raise InputError(f"--ema is {self.ema:g}; the decay of an average is at least 0 and below 1")

    def playing(self, **problem: Any) -> Recipe:
        """The same training with these arguments of ``problem(...)``."""
        return replace(self, problem={**self.problem, **problem})


# The embedded digits (8×8): settings found by experiment.
DIGITS = Recipe(batch_size=64, problem={"epsilon": 0.2})
# The fast methods on CIFAR-10 (Fast-BAT paper, section 5.1; Wong et al., 2020); CyclicLR of their code moves momentum.
CIFAR = Recipe(model="preact_resnet18", epochs=20, lr=0.2, peak_momentum=0.8, augment="crop-flip")
# ImageNet (Wong et al., 2020, without their progressive image sizes: every epoch is at 224).
IMAGENET = Recipe(
    model="imagenet_resnet50",
    epochs=15,
    batch_size=256,
    lr=0.2,
    weight_decay=1e-4,
    augment="resized-crop-flip",
    problem={"epsilon": 2 / 255},
)


DEFAULTS = {"digits": DIGITS, "cifar10": CIFAR}


def recipe_for(data: str, stated: Mapping[str, Recipe]) -> Recipe | None:
    """The recipe for a data set: the stated one, or one derived from CIFAR-10's.

    CIFAR-10's recipe is used for the other sets of small colour images, without flips for SVHN. On ImageNet, its
    problem arguments are combined with :data:`IMAGENET`.

    Args:
        data: the data set's name.
        stated: recipes by data set.

    Returns:
        The recipe, or None if there is neither.
    """
    if data in stated or "cifar10" not in stated:
        return stated.get(data)
    cifar = stated["cifar10"]
    if data in ("cifar100", "tiny_imagenet"):
        return cifar
    if data == "svhn":
        return replace(cifar, augment="none")
    if data == "imagenet":
        return IMAGENET.playing(**{**cifar.problem, **IMAGENET.problem})
    return None
