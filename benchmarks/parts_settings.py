"""The data sets of ``parts.py``, with what is trained and attacked on each."""

from __future__ import annotations

from dataclasses import dataclass

CHEAP = "nearest-40-3-2"
NAMES = {"clean": "clean", "pgd-50-10": "PGD-50-10", CHEAP: "nearest", "autoattack": "AutoAttack"}


@dataclass(frozen=True)
class Setting:
    """A data set with its ε, recipe and attacks.

    about: a sentence for the page.
    epochs: of a row that does not say otherwise.
    flags: of the main job.
    attacks: number of test images by attack; 0 for all.
    seeds: at least so many are needed for a difference to be claimed.
    """

    name: str
    title: str
    about: str
    epsilon: float
    epochs: int
    flags: str
    attacks: dict[str, int]
    seeds: int


SMALL = (
    "--data cifar10 --model small_resnet --examples 10500 --held-out 500 --select pgd-10-1 --precision bfloat16 "
    "--memory-format channels_last --epochs 10"
)
ABOUT_DIGITS = (
    "`small_cnn`, 1,293 training images, 30 epochs of batch 64, rate 0 → 0.1 → 0, momentum 0.9. The network has no "
    "batch normalisation, so that *attacks in train mode* change nothing here."
)
ABOUT_CIFAR = (
    "`small_resnet`, 10,000 training images, crops and flips, 10 epochs of batch 128 in bfloat16, rate 0 → 0.2 → 0. A "
    "small network and a fifth of the images: accuracies are far below published ones."
)
ON_CIFAR = {"clean": 1000, "pgd-50-10": 200, CHEAP: 1000, "autoattack": 200}
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("digits", "Digits, ε = 0.2", ABOUT_DIGITS, 0.2, 30, "--data digits", dict.fromkeys(NAMES, 0), 5),
        Setting("cifar10-8", "CIFAR-10, ε = 8/255", ABOUT_CIFAR, 8 / 255, 10, SMALL, ON_CIFAR, 3),
        Setting("cifar10-16", "CIFAR-10, ε = 16/255", ABOUT_CIFAR, 16 / 255, 10, SMALL, ON_CIFAR, 3),
    )
}
