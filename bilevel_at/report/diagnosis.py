"""Sections that explain the results, from the records of training and from measurements of the networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ..batch import Batch
from ..constraints import LinfBall
from ..diagnose import (
    Perturbations,
    alignment_by_filter,
    average_gradient_norm,
    deciles,
    gradient_alignment,
    kkt_angle,
    loss_landscape,
    perturbation_sizes,
    random_step_norm,
    read_history,
)
from ..errors import InputError
from ..evaluate import attack_from_name
from ..figures import diagnosis as figures
from ..figures.landscape import filters as draw_filters
from ..figures.landscape import landscapes as draw_landscapes
from .groups import Group
from .networks import MOST, subjects
from .numbers import Spread, percent, radius
from .page import Figure, Part, Section, Table

__all__ = ["examples_in_training", "filters", "implicit_term", "loss_around_images", "perturbations"]

ATTACK = "pgd-20-1"
FIRST_IMAGES = (0, 1, 2, 3)
AT_ONCE = 64  # test images in a pass: networks may be large
SEEN = 256  # the number of test images in measurements
FREE = "Where training's own attacker leaves no coordinate free, the implicit term is 0."


def implicit_term(groups: Sequence[Group], folder: Path) -> Section | None:
    """How much a KKT solver's gradient differs from ZeroIG's, by epoch; of groups that have an implicit term."""
    parts: list[Part] = []
    for place, group in enumerate(groups):
        runs = [run.metrics for run in group.runs if run.metrics and all("implicit_cosine" in m for m in run.metrics)]
        if len(parts) == MOST or not runs or len(runs) < len(group.runs):
            continue
        if not any(line["implicit_ratio"] > 0 for lines in runs for line in lines):
            continue
        path = folder / f"implicit-{place}.png"
        figures.coupling(runs[0], path, runs[1:])
        angles = [kkt_angle(line["implicit_ratio"], line["implicit_cosine"]) for lines in runs for line in lines]
        first, last = (_of_seeds([lines[at]["implicit_ratio"] for lines in runs]) for at in (0, -1))
        seeds = f" Thin: each of {len(runs)} seeds; thick: their mean." if len(runs) > 1 else ""
        parts.append(
            Figure(
                path,
                f"{group.label}: the implicit term is {first} of the direct gradient's length in the first epoch "
                f"and {last} in the last, and turns it by at most {max(angles):.2g}° (epoch means). At 0° a KKT "
                f"solver would move θ in ZeroIG's direction.{seeds}",
                f"Size and angle of the implicit term, {group.label}",
            )
        )
    return Section("What the implicit term changes", parts) if parts else None


def _of_seeds(values: Sequence[float]) -> str:
    spread = Spread(tuple(values))
    return f"{spread.mean:.2g}" + ("" if spread.std is None else f" ± {spread.std:.1g}")


def loss_around_images(groups: Sequence[Group], folder: Path, images: Sequence[int] = FIRST_IMAGES) -> Section | None:
    """Loss landscapes of chosen test images, and the alignment of input gradients."""
    parts: list[Part] = []
    rows = []
    looked_at, left_out, unusable = subjects(groups)
    for place, subject in enumerate(looked_at):
        if tuple(images) == FIRST_IMAGES:
            images = range(min(len(FIRST_IMAGES), len(subject.images)))
        beyond = [i for i in images if not 0 <= i < len(subject.images)]
        if beyond or not images:
            raise InputError(f"--images {beyond or 'names none'}; there are {len(subject.images)}, from 0 on")
        few = subject.images[torch.tensor(list(images), device=subject.images.device)]
        epsilon = subject.space.radius
        flat = isinstance(subject.space, LinfBall)
        reach = 2 * epsilon if flat else 2 * epsilon / math.sqrt(math.prod(few.shape))
        points = 41 if math.prod(few.shape) <= 1_000 else 21
        landscape = loss_landscape(subject.model, few.pixels(), few.y, reach, points=points)
        path = folder / f"landscape-{place}.png"
        draw_landscapes(landscape, path, epsilon if flat else None, len(few))
        middle = points // 2
        forward = (landscape.sign_offsets >= 0) & (landscape.sign_offsets <= reach / 2 * (1 + 1e-6))
        along = landscape.margin[:, forward, middle] > 0  # b = 0, from x on
        wrong = along[:, 0]
        crossed, right = int((along.any(1) & ~wrong).sum()), int((~wrong).sum())
        losses = [landscape.loss[:, i, middle].mean().item() for i in (middle, middle + middle // 2)]
        parts.append(
            Figure(
                path,
                f"{subject.said}: from x to the edge of the ball along the gradient's signs the mean loss of these "
                f"{len(few)} goes from {losses[0]:.2g} to {losses[1]:.2g}; of the {right} that are classified "
                f"correctly, {crossed} cross the decision boundary on that line within the ball. Straight, even "
                "contours mean that one step sees the whole ball.",
                f"Loss landscapes, {subject.said}",
            )
        )
        seen = subject.images.sample(SEEN)
        for which, models in subject.checkpoints():
            each = Spread(tuple(gradient_alignment(m, seen, subject.space).nanmean().item() for m in models))
            name = f"{subject.group.label}, {which.replace('_', ' ')} epoch"
            rows.append([name, subject.threat, f"{each.mean:.3f}" + ("" if each.std is None else f" ± {each.std:.3f}")])
    if not parts:
        return Section("The loss around images", left_out) if unusable else None
    caption = (
        f"Cosine of the input gradients at x and at a random point of the ball, mean of up to {SEEN} test images; "
        "near 0 after catastrophic overfitting."
    )
    if any(len(subject.group.runs) > 1 for subject in looked_at):
        caption += " Of several seeds, mean ± standard deviation."
    for ball in dict.fromkeys(subject.threat for subject in looked_at):
        own = [[network, value] for network, of, value in rows if of == ball]
        parts.append(Table(["network", "gradient alignment"], own, f"{caption} The ball: {ball}."))
    return Section("The loss around images", [*parts, *left_out])


def perturbations(groups: Sequence[Group], folder: Path) -> Section | None:
    """Sizes of PGD perturbations, and the effect of a random start on a single step."""
    parts: list[Part] = []
    looked_at, left_out, unusable = subjects(groups)
    for place, subject in enumerate(looked_at):
        few = subject.images.sample(SEEN)
        attack, generator = attack_from_name(ATTACK, subject.space), torch.Generator(few.device).manual_seed(0)
        x, deltas = few.pixels(), []
        for part, label in zip(x.split(AT_ONCE), few.y.split(AT_ONCE), strict=True):
            moved = attack.perturb(subject.model, Batch(part, label), generator)
            deltas.append(subject.space.project(moved - part, part))
        sizes = perturbation_sizes(torch.cat(deltas), subject.space, x)
        path = folder / f"perturbations-{place}.png"
        figures.perturbations(sizes, path, f"{ATTACK} on {len(few)} test images, {subject.said}")
        parts.append(
            Figure(
                path,
                f"{subject.said}, under {ATTACK}: " + _held(sizes, subject.space.radius),
                f"Histograms of perturbation sizes, {subject.said}",
            )
        )
        if place == 0 and sizes.on_sphere is None:
            parts.append(FREE)
        if place == 0 and isinstance(subject.space, LinfBall):
            parts.append(_random_step(subject.model, few, subject.space.radius, subject.said, folder))
    return Section("How large perturbations are", [*parts, *left_out]) if parts or unusable else None


def _held(sizes: Perturbations, epsilon: float) -> str:
    at_range = f"{percent(sizes.at_range)}% of all coordinates at the end of the input range"
    if sizes.on_sphere is not None:
        return f"{percent(sizes.on_sphere)}% of the examples end on the sphere of radius {radius(epsilon)}, {at_range}."
    free = 1 - sizes.at_bound - sizes.at_range
    return (
        f"{percent(sizes.at_bound)}% of all coordinates end at ε = {radius(epsilon)} and {at_range}; the "
        f"{percent(free)}% between are free."
    )


def _random_step(model: torch.nn.Module, images: object, epsilon: float, subject: str, folder: Path) -> Figure:
    norms = [random_step_norm(model, images, epsilon, draws=2, bounds=b) for b in (None, (0.0, 1.0))]  # type: ignore[arg-type]
    path = folder / "random-step.png"
    figures.random_step(norms, path)
    place = min(range(len(norms[0].steps)), key=lambda i: abs(norms[0].steps[i].item() - 1.25 * epsilon))
    measured, bound = norms[0].mean[place].item(), norms[0].bound()[place].item()
    share = measured / (math.sqrt(norms[0].dimension) * epsilon)
    return Figure(
        path,
        f"{subject}: at the step 1.25 ε an FGSM perturbation from a random start is {share:.2f} times as long as one "
        f"without (dashed), {100 * (measured / bound - 1):+.1f}% from what GradAlign's Lemma 1 gives for signs that do "
        "not depend on the start (line). Squares: projected into the input range as well.",
        "Length of FGSM-RS perturbations against the step, and Lemma 1",
    )


def examples_in_training(groups: Sequence[Group], folder: Path) -> Section | None:
    """Gradient norms and steps of the training examples by decile, from ``history.npz``."""
    parts: list[Part] = []
    for place, group in enumerate(groups):
        history = read_history(group.runs[0].path) if len(parts) < MOST else None
        if history is None or int((~history.gradient_norm.isnan()).any(0).sum()) < 10:
            continue
        averages = average_gradient_norm(history)
        tenths = deciles(averages, history.label)
        path = folder / f"gradient-norms-{place}.png"
        figures.gradient_norms(history, path, tenths)
        low, high = (averages[tenths.rows(d, d)].mean().item() for d in (1, 10))
        ratio = f"{high / low:.3g} times " if low > 0 else ""
        parts.append(
            Figure(
                path,
                f"{group.of_first}: over training, the tenth of the examples with the largest input gradients has "
                f"{ratio}those of the smallest (means {high:.2g} and {low:.2g}). Tenths are by the average over "
                "epochs; where their lines cross, norms belong to the epoch more than to the example.",
                f"Gradient norms of training examples by decile, {group.label}",
            )
        )
    return Section("Examples in training", parts) if parts else None


def filters(groups: Sequence[Group], folder: Path) -> Section | None:
    """The filters of one-layer networks before and after training, and what each does to gradient alignment."""
    parts: list[Part] = []
    for place, subject in enumerate(subjects(groups).measured):
        if subject.run.config.get("model") != "one_layer_cnn":
            continue
        history = read_history(subject.run.path)
        if history is None or history.filters is None:
            continue
        path = folder / f"filters-{place}.png"
        draw_filters(history.filters, path)
        whole, without = alignment_by_filter(subject.model, subject.images.sample(SEEN), subject.space)
        most = max(range(len(without)), key=lambda i: without[i])
        parts.append(
            Figure(
                path,
                f"{subject.said}: gradient alignment is {whole:.3f}, and at most {without[most]:.3f} without one "
                f"filter (number {most}). A filter that causes catastrophic overfitting is one whose removal brings "
                "alignment back.",
                f"Filters before and after training, {subject.said}",
            )
        )
    return Section("Filters of the one-layer network", parts) if parts else None
