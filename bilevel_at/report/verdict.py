"""Sentences that summarise the comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set

from .groups import Group
from .numbers import Spread, percent, points
from .ranking import CLEAN, comparable, on_all_images, strongest
from .union import WorstCase, headline

__all__ = ["about_unions", "caption", "lead"]


def about_unions(unions: Sequence[tuple[Group, str, WorstCase]]) -> list[str]:
    """The attacks of the unions, and the accuracy of a union relative to its strongest attack."""
    if not unions:
        return []
    lower = {}
    for group, which, union in unions:
        parts = [s.mean for name in union.attacks if (s := group.accuracy(which, name)) is not None]
        lower[f"{group.label}, {which.replace('_', ' ')}"] = max(0.0, min(parts) - union.spread.mean)
    most = max(lower, key=lambda row: lower[row])
    kinds = sorted({", ".join(union.attacks) for _, _, union in unions})
    return [
        f"Worst case of all: an image counts while none of the row's attacks has broken it ({'; or '.join(kinds)}). "
        f"It is at most {percent(lower[most])} points below the strongest of them alone ({most})."
    ]


def lead(groups: Sequence[Group], columns: Sequence[str]) -> str:
    """The highest accuracy in the worst case of all attacks, compared with the spread over seeds.

    Args:
        groups: of one threat.
        columns: the attacks of the table.
    """
    if strongest(groups) is None:
        return "No attack has been run on every training here, so there is no one number to compare."
    attacks = [n for n in columns if n != CLEAN and all(on_all_images(g, n) for g in groups if g.main is not None)]
    worst = headline(groups, attacks)
    if not worst:
        return "No attack has been run on the same images of every training here; there is no one number to compare."
    of = next(iter(worst.values())).attacks
    under = f"under {of[0]}" if len(of) == 1 else f"in the worst case of {len(of)} attacks ({', '.join(of)})"
    start = under[0].upper() + under[1:]
    scores = [(g, worst[g.label].spread) for g in groups if g.label in worst]
    error = _granularity(worst[scores[0][0].label])
    if not all(w.exact for w in worst.values()):
        error = " It is the least of their accuracies; what they break together is not on record." + error
    if len(scores) == 1:
        group, spread = scores[0]
        clean = group.accuracy(group.main or "", CLEAN)
        return (
            f"{group.label} keeps {spread}% {under}"
            + (f", of {clean}% without an attack" if clean else "")
            + f".{error}"
        )
    if not comparable(groups):
        each = ", ".join(f"{g.label} {s}%" for g, s in scores)
        return f"{start} accuracy is: {each}. These rows are of different images; no best is marked."
    (first, high), (second, low), *_ = sorted(scores, key=lambda pair: -pair[1].mean)
    if percent(high.mean) == percent(low.mean):
        return f"{start} {first.label} and {second.label} are level, at {high}% and {low}%.{error}"
    return (
        f"{start} {first.label} keeps the most, {high}%; {second.label} follows with {low}%{_apart(high, low)}.{error}"
    )


def _apart(high: Spread, low: Spread) -> str:
    difference = high.mean - low.mean
    sentence = f", {points(difference).lstrip('+')} points less"
    spreads = [s.std for s in (high, low) if s.std is not None]
    if not spreads:
        return sentence + ", each from a single seed, which says nothing of the spread over seeds"
    larger = max(spreads)
    if difference < larger:
        return sentence + f", which is within one standard deviation over seeds ({percent(larger)})"
    return sentence + (f", or {difference / larger:.1f} standard deviations over seeds" if larger else "")


def _granularity(worst: WorstCase) -> str:
    if worst.n == 0 or worst.n >= 5000:
        return ""
    a = worst.spread.mean
    error = percent(math.sqrt(a * (1 - a) / worst.n))
    return (
        f" One of {worst.n} images is {percent(1 / worst.n)} points; the sampling error of such an accuracy is about "
        f"{error}."
    )


def caption(groups: Sequence[Group], columns: Sequence[str], images: Set[str], at: str, marked: bool) -> str:
    """The caption of the table.

    Args:
        groups: of one threat.
        columns: the attacks of the table.
        images: the numbers of images of the rows.
        at: the threat in words.
        marked: whether the best results are marked.
    """
    seeds = "; mean ± sample standard deviation over seeds" if any(len(g.runs) > 1 for g in groups) else ""
    order = "" if len(columns) < 3 else " Attacks stand from the weakest to the strongest, by mean accuracy."
    bold = " ▲ and bold: the highest mean among rows of the same checkpoint." if marked else ""
    of = f" of {next(iter(images))} images" if len(images) == 1 else ""
    trained = [f"{g.label}: {name}" for g in groups if (name := g.runs[0].feasible_set)]
    apart = f" The set of training's own attacker differs from the threat ({'; '.join(trained)})." if trained else ""
    return f"Test accuracy in %{of} {at}{seeds}.{order}{bold}{apart}"
