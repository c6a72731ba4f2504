"""Checks for unreliable robust accuracies, measured on a few examples, with a warning of one sentence for each.

Masked gradients make attacks fail without making networks robust (Athalye et al., 2018; Carlini et al., 2019, "On
evaluating adversarial robustness", section 5); after catastrophic overfitting, a network is robust to single-step
attacks only (Wong et al., 2020, section 5.4).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import shares
from ..batch import Batch
from ..constraints import Constraint, LinfBall
from ..data import ImageSet
from ..losses import cross_entropy, input_gradient
from ..modes import Mode, attack_mode
from .attacks import Attack, attack_from_name
from .ensemble import Component
from .nearest import Nearest
from .result import Finding
from .robust import Trace, attacked
from .stages import Descent, Margins, Scaled, Stage
from .threat import ball, norm_of

__all__ = ["LIMITS", "check", "compare_traces"]

QUERIES = 500  # of the square attack: without gradient masking, PGD breaks these images before it


@dataclass(frozen=True)
class Limit:
    """The threshold of a warning, and its text.

    Args:
        most: the largest share of images without a warning.
        says: the text, a format string of the measurements.
        images: the smallest number of images for a warning (or all, if there are fewer): fewer may be chance.
        of: the name of the measurement that is the number of images.
    """

    most: float
    says: str
    images: int = 3
    of: str = "n"

    def exceeded(self, share: float, n: float) -> bool:
        return share > self.most and share * n > min(self.images, n) - 0.5


LIMITS = {
    "train-mode": Limit(
        0.0,
        "the model was left in train mode; it is evaluated in eval mode, where it gives other logits on "
        "{train-mode:.0%} of {n} images: call model.eval() before you compare",
        images=1,
    ),
    "random": Limit(
        0.0,
        "the network is random: two passes over the same images give different logits on {random:.0%} of {n}; single "
        "gradients mislead attacks, so average them (autoattack-rand) before trusting a figure",
        images=1,
    ),
    "vanishing-gradients": Limit(
        0.05,
        "the input gradient of the cross-entropy is exactly 0 on {vanishing-gradients:.0%} of {n} correctly classified "
        "images, where gradient attacks cannot move: something rounds it away (quantised inputs, saturated logits)",
    ),
    "unbounded-attack": Limit(
        0.05,
        "accuracy is still {unbounded-attack:.0%} under PGD at ε = {far:.3g}, where every image can be turned into any "
        "other ({n} images): the attack fails, so robustness at smaller ε is not shown by it either",
    ),
    "black-box": Limit(
        0.05,
        "the square attack, which sees no gradient, breaks {black-box:.0%} of {n} images that PGD leaves standing: "
        "gradients are masked",
    ),
    "square-after-all": Limit(
        0.05,
        "AutoAttack's square, which sees no gradient, broke {square-after-all:.0%} of {images} images after the parts "
        "with one had given them up: gradients are masked",
        of="images",
    ),
    "black-box-after-all": Limit(
        0.05,
        "attacks that do not see this network's gradient broke {black-box-after-all:.0%} of {images} images that those "
        "that do left standing: gradients are masked",
        of="images",
    ),
    "single-step": Limit(
        0.05,
        "one step breaks {single-step:.0%} of {n} images that PGD leaves standing: iterations lose their way, as "
        "masked gradients make them",
    ),
    "catastrophic-overfitting": Limit(
        0.25,
        "FGSM leaves {fgsm:.0%} of {n} images standing and PGD {pgd:.0%}: the network resists single steps alone, as "
        "after catastrophic overfitting ({shorter:.0%} stand at the full step and fall to a part of it)",
    ),
}
"""The threshold and the text of each warning, by name."""


@torch.inference_mode(False)
def check(
    model: nn.Module,
    images: ImageSet,
    constraint: Constraint | None,
    *,
    seed: int = 0,
    batch_size: int = 250,
    left_in_train_mode: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[dict[str, float], list[Finding]]:
    """Check a network for gradient masking and other reasons to doubt its robust accuracy.

    This takes about 600 passes over the images, 500 of them in the square attack.

    Args:
        model: the network.
        images: the images to measure on; a hundred are enough.
        constraint: a ball around images in [0, 1]. Without one, or at radius 0, only checks without attacks are made.
        seed: of the attacks.
        batch_size: images in a batch.
        left_in_train_mode: whether the caller's model was in train mode.
        progress: called with the name of each check before it starts.

    Returns:
        The measurements by name, and the warnings.

    Raises:
        InputError: if an attack raises it.
    """
    progress("gradients")
    measured: dict[str, float] = {"n": len(images)}
    if len(images) == 0:
        return measured, []
    if left_in_train_mode:
        measured["train-mode"] = _differs(model, images, batch_size, "train")
    measured["random"] = _differs(model, images, batch_size, "eval")
    clean = attacked(model, images, Attack("clean"), seed=seed, batch_size=batch_size)
    differentiable = _differentiable(model, images, batch_size)
    right = images[clean.correct.nonzero().flatten()]
    measured["vanishing-gradients"] = _vanishing(model, right, batch_size) if differentiable else 1.0
    norm = norm_of(constraint)
    radius = getattr(constraint, "radius", None) or 0.0
    if differentiable and norm is not None and radius > 0:
        measured |= _attacked(model, images, norm, radius, seed, batch_size, progress)
    measured = shares.first(lambda: measured)  # a random network differs from process to process
    return measured, findings(measured)


def findings(measured: Mapping[str, float]) -> list[Finding]:
    """The warnings for measurements beyond their threshold."""
    return [
        Finding(name, limit.says.format_map(measured))
        for name, limit in LIMITS.items()
        if name in measured and limit.exceeded(measured[name], measured[limit.of])
    ]


def _attacked(
    model: nn.Module,
    images: ImageSet,
    norm: str,
    epsilon: float,
    seed: int,
    batch_size: int,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """The measurements that need attacks: shares of all images, and accuracies."""

    def run(attack: Attack, what: str) -> Trace:
        progress(what)
        return attacked(model, images, attack, seed=seed, batch_size=batch_size)

    space = ball(norm, epsilon)
    far = 1.0 if norm == "linf" else math.sqrt(images[slice(0, 1)].pixels()[0].numel())
    fgsm = run(attack_from_name("fgsm", space), "FGSM")
    pgd = run(attack_from_name("pgd-20-3", space), "PGD")
    unbounded = run(attack_from_name("pgd-50-1-any", ball(norm, far)), "PGD at any distance")
    measured = {
        "far": far,
        "fgsm": _share(fgsm.correct),
        "pgd": _share(pgd.correct),
        "unbounded-attack": _share(unbounded.correct),
        "single-step": _share(pgd.correct & ~fgsm.correct),
    }
    if isinstance(space, LinfBall):
        measured["shorter"] = _share(fgsm.correct & _shorter_steps(model, images, epsilon, batch_size))
        lost = measured["fgsm"] - measured["pgd"]
        measured["catastrophic-overfitting"] = lost if measured["pgd"] < 0.5 * measured["fgsm"] else 0.0
    if images[slice(0, 1)].pixels().ndim == 4:
        square = Attack("square", space, [Component("square", norm, epsilon, seed=seed, queries=QUERIES)])
        measured["black-box"] = _share(pgd.correct & ~run(square, f"square attack, {QUERIES} queries").correct)
    return measured


def compare_traces(traces: Mapping[str, Trace], attacks: Mapping[str, Attack]) -> dict[str, float]:
    """Compare complete evaluations of the same images at one radius, for :func:`findings`.

    Args:
        traces: the traces by name.
        attacks: the attack of each trace.

    Returns:
        ``square-after-all``, the share of images that AutoAttack's square breaks after the parts with a gradient;
        ``black-box-after-all``, the share that the square attack or transfers break and no gradient attack does.
        Gradient attacks count from 20 steps of PGD and of the nearest classes, or 10 of BETA, and so do AutoAttack's
        parts. ``images``: the number of images. Empty if there is nothing to compare.
    """
    measured: dict[str, float] = {}
    black, white = [], []
    for key, trace in traces.items():
        name, stages = attacks[key].name, [stage.name for stage in attacks[key].stages]
        if name == "autoattack" and "square" in stages:
            measured["square-after-all"] = _share(trace.broken == 1 + stages.index("square"))
        if name.startswith(("square", "transfer")):
            black.append(trace.correct)
        elif any(map(_thorough, attacks[key].stages)):
            white.append(trace.correct)
    if black and white:
        standing = torch.stack(white).all(0)
        measured["black-box-after-all"] = _share(standing & ~torch.stack(black).all(0))
    return measured | ({"images": len(next(iter(traces.values())).broken)} if measured else {})


def _thorough(stage: Stage) -> bool:
    if isinstance(stage, Scaled):
        return _thorough(stage.unit)
    if isinstance(stage, (Descent, Nearest)):
        return stage.steps >= 20
    return stage.steps >= 10 if isinstance(stage, Margins) else isinstance(stage, Component)


def _share(which: Tensor) -> float:
    return which.float().mean().item() if len(which) else 0.0


def _batches(images: ImageSet, batch_size: int) -> Iterator[Batch]:
    for rows in torch.arange(len(images), device=images.device).split(batch_size):
        yield Batch(images[rows].pixels(), images.y[rows])


def _differs(model: nn.Module, images: ImageSet, batch_size: int, other: Mode) -> float:
    """The share of images whose logits in mode ``other`` differ from those in eval mode."""
    differs = []
    for batch in _batches(images, batch_size):
        with torch.no_grad():
            with attack_mode(model, "eval"):
                first = model(batch.x)
            with _buffers_kept(model), attack_mode(model, other), torch.random.fork_rng():
                try:
                    second = model(batch.x)
                except ValueError:  # batch statistics do not exist for a single image
                    second = torch.full_like(first, torch.nan)
        scale = first.abs().amax(1).clamp(min=1e-6)
        same = (first - second).abs().amax(1) / scale <= 1e-3  # rounding may differ from pass to pass
        differs.append(~same)
    return _share(torch.cat(differs)) if differs else 0.0


def _differentiable(model: nn.Module, images: ImageSet, batch_size: int) -> bool:
    x = next(_batches(images, batch_size)).x.detach().requires_grad_()
    with attack_mode(model, "eval"), torch.enable_grad():
        out = model(x).sum()
        return out.requires_grad and torch.autograd.grad(out, x, allow_unused=True)[0] is not None


def _vanishing(model: nn.Module, images: ImageSet, batch_size: int) -> float:
    """The share of images at which ∇_x ℓ is exactly 0 in every value."""
    with attack_mode(model, "eval"):
        gradients = (
            input_gradient(cross_entropy, model, b, torch.zeros_like(b.x))[0] for b in _batches(images, batch_size)
        )
        zero = [(gradient == 0).flatten(1).all(1) for gradient in gradients]
    return _share(torch.cat(zero)) if zero else 0.0


def _shorter_steps(model: nn.Module, images: ImageSet, epsilon: float, batch_size: int) -> Tensor:
    """``[N]`` bool: images broken by a fraction of the FGSM step ("distorted" in Kim et al., 2021)."""
    broken = []
    for batch in _batches(images, batch_size):
        fell = torch.zeros(len(batch), dtype=torch.bool, device=batch.x.device)
        with attack_mode(model, "eval"), torch.no_grad():
            gradient, _ = input_gradient(cross_entropy, model, batch, torch.zeros_like(batch.x))
            for part in torch.linspace(0.1, 0.9, 9).tolist():
                moved = (batch.x + part * epsilon * gradient.sign()).clamp(0, 1)
                fell |= model(moved).argmax(1) != batch.y
        broken.append(fell)
    return torch.cat(broken)


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore all buffers on exit, whether they are changed in place or replaced."""
    saved = [
        (module, name, b, b.clone())
        for module in model.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in saved:
            module._buffers[name] = buffer
            buffer.copy_(value)
