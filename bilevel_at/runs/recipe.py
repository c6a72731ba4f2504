"""How to train: the published settings of a method on a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..data.loader import Augment
from ..errors import InputError, whole_number

__all__ = ["CIFAR", "DEFAULTS", "DIGITS", "IMAGENET", "Recipe", "Schedule", "modern", "recipe_for"]

Schedule = Literal["linear", "one-cycle", "one-cycle-by-epoch", "multistep", "constant"]
"""How the learning rate goes, as ``--schedule`` has it; :class:`Recipe` says how each."""
CYCLES = ("linear", "one-cycle", "one-cycle-by-epoch")


@dataclass(frozen=True)
class Recipe:
    """SGD settings, and the arguments of ``problem(...)`` that differ from its defaults on this data set.

    Args:
        model: network by name, timm:NAME for one of timm; "file" is the problem file's own model(shape, classes).
        epochs: passes over the training set.
        batch_size: examples in a batch.
        accumulate: batches whose gradients make one step.
        replays: updates of θ made on each batch before the next one (Free-AT's m).
        lr: peak learning rate.
        schedule: "linear" goes 0 → lr over the first half of all steps and back to 0; "one-cycle" goes lr/25 → lr over
            the first 30 % and then to 4e-6 lr, along cosines (PyTorch's OneCycleLR), and "one-cycle-by-epoch" does so
            an epoch at a time where there are several; "multistep" divides by 10 after each epoch of the milestones;
            "constant" stays.
        milestones: epochs after which "multistep" divides the rate by 10.
        momentum: of SGD.
        peak_momentum: the momentum at the peak of the rate; momentum goes from ``momentum`` to it and back, as the rate
            rises and falls. None, or schedule "multistep" or "constant": constant momentum.
        weight_decay: of SGD.
        augment: none; crop-flip, a random crop (padding 4) and flip; or resized-crop-flip, for streamed images.
        extra_fraction: share of each batch that is drawn from extra data, where there is any (Gowal et al., 2021).
        ema: decay of an exponential moving average of the weights, which is evaluated and saved instead; 0 for none.
        average_from: the epoch from whose end on the weights at the ends of epochs are averaged equally, and evaluated
            and saved instead (Izmailov et al., 2018); 0 for never.
        reestimate: estimate the batch-normalisation statistics of averaged weights from the training images after each
            epoch, which costs a third of a standard one; otherwise they are averaged as the weights are.
        epsilon_warmup: epochs in which ε grows linearly from 0, by update, and with it what the problem derives from
            it; 0 for none.
        held_out: training images that are held out to select the best epoch; 0 for a tenth, at most 5,000.
        select: the attack on the held-out images that picks the best epoch.
        problem: arguments of ``problem(...)``.
        modern: what this method needs otherwise in ``--recipe modern``, by field.

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
    extra_fraction: float = 0.7
    ema: float = 0.0
    average_from: int = 0
    reestimate: bool = False
    epsilon_warmup: int = 0
    held_out: int = 0
    select: str = "pgd-20-1"
    problem: Mapping[str, Any] = field(default_factory=dict)
    modern: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "replays"):
            whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        for name in ("average_from", "epsilon_warmup", "held_out"):
            whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 0)
        if self.replays > 1 and self.accumulate > 1:
            raise InputError(f"--replays is {self.replays} and --accumulate {self.accumulate}; one of them must be 1")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"--lr is {self.lr:g}; it must be a positive number")
        if self.schedule not in CYCLES:
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
        if not 0 <= self.extra_fraction <= 1:
            raise InputError(f"--extra-fraction is {self.extra_fraction:g}; it must be from 0 to 1")
        if self.ema and self.average_from:
            raise InputError(f"--ema is {self.ema:g} and --average-from {self.average_from}; one of them must be 0")
        if self.reestimate and not self.averages:
            raise InputError("--reestimate is for averaged weights; add --ema 0.999 or --average-from EPOCH")
        if self.average_from > self.epochs:
            raise InputError(f"--average-from is {self.average_from}, and there are {self.epochs} epochs")
        if self.epsilon_warmup > self.epochs:
            raise InputError(f"--epsilon-warmup is {self.epsilon_warmup}, and there are {self.epochs} epochs")

    @property
    def averages(self) -> bool:
        """Whether an average of the weights is evaluated and saved."""
        return self.ema > 0 or self.average_from > 0

    def playing(self, **problem: Any) -> Recipe:
        """The same training with these arguments of ``problem(...)``."""
        return replace(self, problem={**self.problem, **problem})


DIGITS = Recipe(batch_size=64, problem={"epsilon": 0.2})
"""The embedded digits (8×8): settings found by experiment."""
CIFAR = Recipe(model="preact_resnet18", epochs=20, lr=0.2, peak_momentum=0.8, augment="crop-flip")
"""The fast methods on CIFAR-10 (Fast-BAT paper, section 5.1; Wong et al., 2020). CyclicLR, in their code, moves the
momentum."""
IMAGENET = Recipe(
    model="imagenet_resnet50",
    epochs=15,
    batch_size=256,
    lr=0.2,
    weight_decay=1e-4,
    augment="resized-crop-flip",
    problem={"epsilon": 2 / 255},
)
"""ImageNet (Wong et al., 2020, without their progressive image sizes: every epoch is at 224)."""


DEFAULTS = {"digits": DIGITS, "cifar10": CIFAR}
"""The recipes of problem files that state none, by data set."""


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
        # De Jorge et al. (2022) let ε grow for 5 epochs there; without it training falls to the largest class.
        return replace(cifar, augment="none", epsilon_warmup=min(5, cifar.epochs))
    if data == "imagenet":
        return IMAGENET.playing(**{**cifar.problem, **IMAGENET.problem})
    return None


def modern(data: str, published: Recipe, smooths: bool = True) -> Recipe:
    """The training of the FastAT benchmark of 2026, with the method's own arguments.

    ResNet-18, 100 epochs of batch 128, rate by one cycle an epoch at a time with peak 0.1, momentum 0.95 → 0.85 → 0.95,
    weight decay 5e-4, labels smoothed by 0.4 in attack and training, an exponential average of the weights with decay
    0.9995, 1,000 images held out and the best epoch chosen by PGD-10 on them. Replays divide the epochs. The benchmark
    keeps the better of the last and the averaged weights; here the averaged ones are kept. On the digits, and on
    ImageNet, network, epochs and batches stay as published; there are too few updates on the digits for the decay,
    which is 0.99 there. ``published.modern`` goes before all of these.

    Args:
        data: the data set's name.
        published: the method's recipe for it.
        smooths: whether ``problem(...)`` takes ``label_smoothing``.
    """
    arguments = {**published.problem, "label_smoothing": 0.4} if smooths else published.problem
    if data not in ("digits", "imagenet"):
        epochs = max(1, 100 // published.replays)
        published = replace(published, model="resnet18", epochs=epochs, batch_size=128)
    benchmark: dict[str, Any] = {
        "lr": 0.1,
        "schedule": "one-cycle-by-epoch",
        "milestones": (),
        "momentum": 0.95,
        "peak_momentum": 0.85,
        "weight_decay": 5e-4,
        "ema": 0.99 if data == "digits" else 0.9995,
        "average_from": 0,
        "held_out": 0 if data == "digits" else 1_000,
        "select": "pgd-10-1",
    }
    return replace(published, **{**benchmark, **published.modern, "problem": arguments})
