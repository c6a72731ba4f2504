"""An active test of an evaluation: are adversarial examples found that are known to exist?

For each image a read-out is made under which a chosen point of the ball is an adversarial example, and every attack has
to find one. An attack that misses it misses others, too, and its robust accuracy shows nothing. After Zimmermann,
Brendel, Tramèr and Carlini, "Increasing Confidence in Adversarial Robustness Evaluations" (2022), section 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..constraints import Constraint
from ..data import Images, ImageSet
from ..division import divided
from ..errors import InputError
from ..modes import attack_mode
from .attacks import Attack
from .result import Finding
from .robust import attacked
from .stages import OnSurrogate
from .threat import Threat, can_sample

__all__ = [
    "ACTIVE",
    "ActiveTest",
    "Planted",
    "ReadOut",
    "active_findings",
    "active_test",
    "checks_asked",
    "plant",
    "testable",
]

ACTIVE = 50  # images, unless the user says otherwise
INNER, BOUNDARY = 400, 40  # samples of the inner part of the ball, and candidates for the planted point
NEAR = 0.75  # the threshold is this part of the way from the inner samples to the planted point
INSIDE = 0.9  # inner samples are this part of the way from x to the ball's points
RIDGE = 1.0  # added to the covariance of the features, in units of its mean eigenvalue
QUERIES = 400  # of the random search
FAR = 10.0  # the scale of the normal draws that are projected onto the boundary
MOST_MISSED, LEAST_IMAGES = 0.05, 3  # a warning from there on
TOO_EASY = 0.5  # a share found by random search that makes the test say little


def checks_asked(words: Sequence[str]) -> tuple[int, int]:
    """How many images the checks look at, and how many the active test.

    Words are a number of images, ``active`` (:data:`ACTIVE` images) or ``active:20``; ``0 active`` is the active test
    alone. What is not named is 100 images for the checks and none for the active test.

    Raises:
        InputError: for anything else.
    """
    passive, active = 100, 0
    for word in words:
        name, colon, number = word.partition(":")
        value = number if colon else word
        if name == "active" and not colon:
            active = ACTIVE
        elif not re.fullmatch(r"-?\d+", value) or (colon and name != "active"):
            raise InputError(f"--checks is {word!r}; it takes a number of images, active, or active:20")
        elif int(value) < (1 if colon else 0):
            least = 1 if colon else 0
            raise InputError(f"--checks is {word}; it must be at least {'active:' * bool(colon)}{least}")
        elif colon:
            active = int(value)
        else:
            passive = int(value)
    return passive, active


class ReadOut(nn.Module):
    """A network with another last layer: class 0 on one side of a hyperplane in its features, class 1 on the other.

        u(x) = (τ − wᵀφ(x)) / (τ − wᵀφ(x₀))        logits (m u / 2, −m u / 2, and below both for every other class)

    Features φ are the inputs of the last linear layer where its output is the network's, and otherwise the network's
    logits, so that whatever happens to the logits happens here, too. m is the network's own margin at x₀: the new
    network is as confident there as the network is, and a softmax that saturates saturates here.
    """

    def __init__(self, network: nn.Module, layer: nn.Module | None, classes: int) -> None:
        super().__init__()
        self.network, self.classes = network, classes
        self._layer = [layer]  # in a list, so that it is not registered twice
        self.w, self.threshold, self.scale, self.margin = torch.zeros(0), torch.zeros(()), torch.ones(()), 1.0

    def features(self, x: Tensor) -> Tensor:
        """φ ``[B, d]``, with its graph."""
        layer = self._layer[0]
        if layer is None:
            out: Tensor = self.network(x)
            return out.flatten(1)
        inputs: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        try:
            self.network(x)
        finally:
            hook.remove()
        return inputs[-1].flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        side = (self.threshold - self.features(x).to(self.w.dtype) @ self.w) / self.scale
        half = (self.margin * side / 2).to(x.dtype)
        below = torch.minimum(half, -half) - abs(self.margin)
        return torch.stack([half, -half, *[below] * (self.classes - 2)], 1)


@dataclass(frozen=True)
class Planted:
    """An image, a network that classifies it as 0, and a point of x + C(x) that it does not.

    Args:
        x: ``[1, ...]``.
        network: the network with the new read-out.
        point: ``[1, ...]``, the planted adversarial example.
    """

    x: Tensor
    network: ReadOut
    point: Tensor


@dataclass(frozen=True)
class ActiveTest:
    """The outcome of the active test.

    Args:
        images: the number of images tried.
        planted: the number of images for which a read-out could be made.
        random: the share of planted examples that random search finds.
        shares: attack -> the share of planted examples that it finds.
    """

    images: int
    planted: int
    random: float
    shares: dict[str, float]

    def asdict(self) -> dict[str, Any]:
        """For a file: ``{"images": 50, "planted": 50, "random": 0.02, "found": {"pgd-50-10": 1.0}}``."""
        return {"images": self.images, "planted": self.planted, "random": self.random, "found": dict(self.shares)}


def testable(attacks: Sequence[Attack], space: Constraint) -> list[Attack]:
    """The attacks that can be tested: those in that set which look at the network itself."""
    key = Threat.of(space).key
    return [
        attack
        for attack in attacks
        if attack.threat is not None
        and attack.threat.key == key
        and attack.stages
        and not any(isinstance(stage, OnSurrogate) for stage in attack.stages)
    ]


def active_test(
    model: nn.Module,
    images: ImageSet,
    space: Constraint,
    attacks: Sequence[Attack],
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> ActiveTest:
    """Plant an adversarial example beside each image, and let every attack look for it.

    Every image has a network of its own, so attacks see one image at a time. Several processes share the images.

    Args:
        model: the network.
        images: the images.
        space: C(x).
        attacks: the attacks, as :func:`testable` gives them.
        seed: of all draws.
        progress: called with the name of each attack before each image.
    """
    generator = torch.Generator(images.device).manual_seed(seed)

    def examples() -> Iterator[tuple[int, Planted, int]]:
        layer = _last_linear(model, images[slice(0, 1)].pixels())
        for place in range(len(images)):
            example = plant(model, images[slice(place, place + 1)].pixels(), space, generator, layer)
            if example is not None:
                yield place, example, _random_search(example, space, generator)

    def found(part: tuple[int, Planted, int]) -> list[int]:
        place, example, by_chance = part
        single = Images(example.x, torch.zeros(1, dtype=torch.int64, device=images.device), images.classes)
        by_attacks = []
        for attack in attacks:
            progress(f"active test, {attack.name}, image {place + 1}")
            by_attacks.append(int(not attacked(example.network, single, attack, seed=seed).correct.item()))
        return [by_chance, *by_attacks]

    with attack_mode(model, "eval"), torch.inference_mode(False):
        hits = divided(found, examples())
    names = ["random", *(attack.name for attack in attacks)]
    parts = {name: sum(row[k] for row in hits) / max(1, len(hits)) for k, name in enumerate(names)}
    return ActiveTest(len(images), len(hits), parts.pop("random"), parts)


@torch.no_grad()
def plant(
    model: nn.Module, x: Tensor, space: Constraint, generator: torch.Generator, layer: nn.Module | None = None
) -> Planted | None:
    """Make the read-out of one image.

    w is the linear discriminant between samples φ(x + δ) of the inner part of C(x) and one point of its boundary: w =
    (Σ + ρI)⁻¹(φ(point) − mean). Of several points the one that lies farthest beyond all inner samples is planted. The
    threshold τ is half way between them.

    Args:
        model: the network, in eval mode.
        x: ``[1, ...]``.
        space: C(x).
        generator: of the samples.
        layer: the last linear layer, whose inputs are the features; None for the logits.

    Returns:
        None if no point of the boundary can be told from the inner samples.
    """
    logits = model(x)
    top = logits.topk(2, 1).values[0] if logits.shape[1] > 1 else logits.new_zeros(2)
    network = ReadOut(model, layer, logits.shape[1]).eval()
    inside = [_inside(x, space, INNER // 2, generator), _boundary(x, space, INNER // 2, generator)]
    inner = torch.cat([torch.zeros_like(x), *(INSIDE * part for part in inside)])
    points = _boundary(x, space, BOUNDARY, generator)
    features = network.features(x + inner).double()
    mean = features.mean(0)
    centred = features - mean
    covariance = centred.T @ centred / len(features)
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    covariance.diagonal().add_(ridge)
    candidates = network.features(x + points).double() - mean
    weights = torch.linalg.solve(covariance, candidates.T).T
    own, others = (weights * candidates).sum(1), (weights @ centred.T).amax(1)
    gaps = (own - others) / own.clamp(min=1e-300)
    best = int(gaps.nan_to_num(-torch.inf).argmax())
    w = weights[best]
    offset = w @ mean
    network.w, network.threshold = w, offset + others[best] + NEAR * (own[best] - others[best])
    network.scale = network.threshold - w @ features[0]
    network.margin = float(top[0] - top[1])
    point = x + points[best : best + 1]
    exists = gaps[best] > 1e-6 and network.scale > 0 and network.margin > 0
    if not exists or int(network(x).argmax()) != 0 or int(network(point).argmax()) == 0:
        return None
    return Planted(x, network, point)


def _inside(x: Tensor, space: Constraint, count: int, generator: torch.Generator) -> Tensor:
    """Random perturbations of x in C(x), ``[count, ...]``: uniform where the set can be sampled."""
    many = x.expand(count, *x.shape[1:])
    if can_sample(space):
        return space.sample(many, generator)
    lengths = torch.rand(count, *[1] * (x.ndim - 1), generator=generator, device=x.device, dtype=x.dtype)
    return lengths * _boundary(x, space, count, generator)


def _boundary(x: Tensor, space: Constraint, count: int, generator: torch.Generator) -> Tensor:
    """Random perturbations of x on the boundary of C(x), ``[count, ...]``: far points, projected."""
    many = x.expand(count, *x.shape[1:])
    draw = FAR * torch.randn(many.shape, generator=generator, device=x.device, dtype=x.dtype)
    return space.project(draw, many)


@torch.no_grad()
def _random_search(example: Planted, space: Constraint, generator: torch.Generator) -> int:
    """1 if one of many random points of the set, half of them on its boundary, is an adversarial example."""
    x = example.x
    points = [_inside(x, space, QUERIES // 2, generator), _boundary(x, space, QUERIES // 2, generator)]
    return int(bool((example.network(x + torch.cat(points)).argmax(1) != 0).any()))


@torch.no_grad()
def _last_linear(model: nn.Module, x: Tensor) -> nn.Module | None:
    """The linear layer whose output is the network's output; None if there is none."""
    outputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, given: Any, out: Tensor) -> None:
        outputs[module] = out

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(record) for module in linear]
    try:
        logits = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    same = [m for m, out in outputs.items() if out.shape == logits.shape and torch.equal(out, logits)]
    return same[-1] if same else None


def active_findings(record: Mapping[str, Any]) -> list[Finding]:
    """The warnings of an active test, from :meth:`ActiveTest.asdict`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: if it is no such record.
    """
    planted, images, random = int(record["planted"]), int(record["images"]), float(record["random"])
    reasons = []
    if images and planted < 0.5 * images:
        reasons.append(
            Finding(
                "active-unplanted",
                f"the active test could plant an adversarial example beside {planted} of {images} images only: the "
                "network's features hardly change within the ball",
            )
        )
    for name, share in record["found"].items():
        missed = (1 - float(share)) * planted
        if 1 - float(share) > MOST_MISSED and missed > min(LEAST_IMAGES, planted) - 0.5:
            reasons.append(
                Finding(
                    f"active:{name}",
                    f"{name} finds {float(share):.0%} of {planted} adversarial examples that are known to exist "
                    f"(random search finds {random:.0%}): an accuracy under it shows no robustness",
                )
            )
    if planted and random > TOO_EASY:
        reasons.append(
            Finding(
                "active-easy",
                f"random search finds {random:.0%} of {planted} planted adversarial examples, so that the active test "
                "says little for the attacks that find them",
            )
        )
    return reasons
