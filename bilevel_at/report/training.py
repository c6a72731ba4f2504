"""Training, epoch after epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..figures import comparison
from ..figures.comparison import Panel, legible, mean_curve, one_curve
from ..figures.training import epochs
from ..runs.record import Run
from .groups import Group, by_threat
from .numbers import percent
from .page import Figure, Part, Section

__all__ = ["training"]


def training(groups: Sequence[Group], folder: Path) -> Section | None:
    """Loss, held-out accuracies, gradient alignment and learning rate; a figure for each threat."""
    with_metrics = [group for group in groups if any(run.metrics for run in group.runs)]
    parts: list[Part] = []
    threats = by_threat(with_metrics)
    for place, (at, rivals) in enumerate(threats):
        path = folder / (f"training-{place}.png" if place else "training.png")
        figure = _figure(rivals, path, [group.label for group in groups])
        if figure is not None:
            start = f"Held-out accuracies {at}. " if len(threats) > 1 else ""
            parts.append(replace(figure, caption=start + figure.caption))
    return Section("Training", parts) if parts else None


def _figure(groups: Sequence[Group], path: Path, order: Sequence[str]) -> Figure | None:
    """Trainings of one threat: one run, or small multiples of several. None if there are no metrics.

    order: the labels of all groups of the page, so that each has one style in all its figures.
    """
    if len(groups) == 1 and len(groups[0].runs) == 1:
        run = groups[0].runs[0]
        epochs(run.metrics, path)
        return Figure(path, _of_one(groups[0].label, run), "Training curves of one run")
    attacks = {str(line["attack"]) for g in groups for r in g.runs for line in r.metrics if line.get("attack")}
    attack = attacks.pop() if len(attacks) == 1 else None
    curves = {g.label: [run.metrics for run in g.runs if run.metrics] for g in groups}
    panels = [
        Panel("robust", f"held-out accuracy under {legible(attack or 'its own attack')} (%)", percent=True),
        Panel("clean", "held-out clean accuracy (%)", percent=True),
        Panel("train", "training accuracy, as attacked (%)", percent=True),
        Panel("loss", "training loss under attack"),
        Panel("alignment", "alignment of input gradients"),
        Panel("lr", "learning rate"),
    ]
    panels = [p for p in panels if any(one_curve(lines, p.key) for runs in curves.values() for lines in runs)]
    if not panels:
        return None
    comparison.curves(curves, panels, path, order)
    return Figure(path, _of_several(curves, attack), "Training curves, a line for each training")


def _of_one(label: str, run: Run) -> str:
    loss, robust, train, alignment = (one_curve(run.metrics, k) for k in ("loss", "robust", "train", "alignment"))
    sentences = []
    if loss:
        first, last = min(loss), max(loss)
        sentences.append(f"the loss goes from {loss[first]:.3g} in epoch {first} to {loss[last]:.3g} in epoch {last}")
    if robust:
        attack = next((str(line["attack"]) for line in run.metrics if line.get("attack")), "attack")
        best, last = max(robust, key=lambda e: (robust[e], e)), max(robust)
        after = "its last" if best == last else f"with {percent(robust[last])}% after the last, {last}"
        sentences.append(
            f"held-out accuracy under {attack} is highest in epoch {best} ({percent(robust[best])}%), {after}"
        )
        if last in train:
            sentences.append(
                f"on training examples as they were attacked it ends {_above(train[last] - robust[last])} held-out ones"
            )
    if alignment:
        low = min(alignment, key=lambda e: alignment[e])
        sentences.append(
            f"input gradients at an image and at a random point near it have cosine {alignment[max(alignment)]:.2f} at "
            f"the end, at least {alignment[low]:.2f} (epoch {low}); towards 0 one step no longer finds the worst case"
        )
    return f"{label}: " + "; ".join(sentences) + "."


def _above(difference: float) -> str:
    return f"{percent(abs(difference))} points {'above' if difference >= 0 else 'below'} that on"


def _of_several(curves: Mapping[str, Sequence[Sequence[Mapping[str, object]]]], attack: str | None) -> str:
    """The caption for several trainings. ``attack`` is that of the held-out accuracies; None if they differ."""
    seeds = [len(runs) for runs in curves.values()]
    sentences = ["Thick: mean over seeds; thin: each seed."] if max(seeds) > 1 else []
    if len(seeds) == 1:
        sentences = [f"Thick: mean over {seeds[0]} seeds; thin: each seed."] if seeds[0] > 1 else []
    robust = {label: c for label, runs in curves.items() if (c := mean_curve(runs, "robust"))}
    ends = {label: c[max(c)] for label, c in robust.items()}
    if attack is None:
        sentences.append("Held-out accuracies are under different attacks, each that which chose its best epoch.")
    elif len(ends) > 1:
        high, low = max(ends, key=lambda k: ends[k]), min(ends, key=lambda k: ends[k])
        level = percent(ends[high]) == percent(ends[low])
        sentences.append(
            f"After the last epoch all keep {percent(ends[high])}% of held-out images under {attack}."
            if level
            else f"After its last epoch {high} is the most robust on held-out images ({percent(ends[high])}% under "
            f"{attack}), {low} the least ({percent(ends[low])}%)."
        )
    gaps = {}
    for label, runs in curves.items():
        train = mean_curve(runs, "train")
        if label in robust and (common := set(train) & set(robust[label])):
            gaps[label] = train[max(common)] - robust[label][max(common)]
    wide = max(gaps, key=lambda k: gaps[k], default="")
    if wide and gaps[wide] > 0:
        who = wide if len(curves) > 1 else "Training"
        sentences.append(
            f"{who} ends {percent(gaps[wide])} points higher on training examples, as it attacks them, than on "
            f"held-out images under {attack or 'attack'}" + (", the widest gap here." if len(gaps) > 1 else ".")
        )
    alignment = {label: min(c.values()) for label, runs in curves.items() if (c := mean_curve(runs, "alignment"))}
    if alignment:
        low = min(alignment, key=lambda k: alignment[k])
        whose = f", in {low}" if len(curves) > 1 else ""
        sentences.append(f"The lowest gradient alignment of any epoch is {alignment[low]:.2f}{whose}.")
    return " ".join(sentences)
