"""The headline of a network: its accuracy in the worst case of all attacks made on the same images in one threat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluate.radius import number_from_text
from ..evaluate.threat import Threat
from .numbers import number
from .outcomes import outcomes

__all__ = ["WorstCase", "attack_and_radius", "per_example", "under_threat", "worst_case"]

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class WorstCase:
    """Accuracy under the union of attacks.

    Args:
        accuracy: the share of images that no attack breaks.
        attacks: the names of the attacks, without ``clean``.
        n: the number of images.
        exact: whether the outcome of every example is on record for all attacks. Otherwise ``accuracy`` is the least
            of the accuracies, which the union of the attacks may lie below.
    """

    accuracy: float
    attacks: tuple[str, ...]
    n: int
    exact: bool = True

    def __str__(self) -> str:
        of = self.attacks[0] if len(self.attacks) == 1 else f"the worst case of {', '.join(self.attacks)}"
        return f"{self.accuracy:.1%} under {of}" + ("" if self.exact else " (the least of them)")


def attack_and_radius(name: str) -> tuple[str, float | None]:
    """Split ``pgd-50-10@8/255`` into attack and ε; ε is None if the name does not end in one (paths may have an @)."""
    attack, _, at = name.rpartition("@")
    try:
        return (attack, number_from_text(at)) if attack else (name, None)
    except ValueError:
        return name, None


def under_threat(entries: Mapping[str, Entry], threat: Threat, data: str | None = None) -> dict[str, Entry]:
    """The entries of a checkpoint that are in the threat, ``clean`` included, by the attack's name.

    Args:
        entries: of ``results.json``.
        threat: the threat model.
        data: the fingerprint of the images; without one, results on fewer images than another result of the same
            attack are left out.
    """
    chosen: dict[str, Entry] = {}
    for full, entry in entries.items():
        name, few, _ = full.rpartition("[n=") if full.endswith("]") else (full, "", "")
        if entry.get("data") != data if data is not None else few:
            continue
        name = name if few else full
        attack, at = attack_and_radius(name)
        if not threat.is_ball:
            if name == "clean" or (entry.get("threat") == threat.name and entry.get("norm") is None):
                chosen[name] = entry
            continue
        if entry.get("threat") or (threat.norm is not None and entry.get("norm") not in (None, threat.norm)):
            continue
        if at is None:
            chosen[name] = entry
        elif threat.epsilon is not None and abs(number(entry.get("epsilon")) - threat.epsilon) < 1e-9:
            chosen.setdefault(attack, entry)
    return chosen


def worst_case(run: Path, entries: Mapping[str, Entry], among: Collection[str] | None = None) -> WorstCase | None:
    """The headline of a checkpoint: an example counts while no attack breaks it.

    Attacks of the most frequent images, network and set count, on which the union is formed example by example. An
    attack without a record of each example counts with its accuracy: the headline is at most the least of all.

    Args:
        run: the directory, whose ``evaluation/WHICH/*.npz`` are read.
        entries: the entries in one threat, as :func:`under_threat` gives them.
        among: only these attacks (and ``clean``).

    Returns:
        None if no attack was made.

    Raises:
        InputError: if a file of outcomes is damaged.
    """
    chosen = {name: entry for name, entry in entries.items() if among is None or name in among or name == "clean"}
    same = _same_kind(chosen)
    attacks = tuple(name for name in same if name != "clean")
    if not attacks:
        return None
    known = _outcomes_of(run, same)
    accuracies = [number(same[name]["accuracy"]) for name in same]
    if known:
        accuracies.append(float(np.logical_and.reduce(list(known.values())).mean()))
    sizes = [same[name].get("n") for name in attacks]
    return WorstCase(
        min(accuracies),
        attacks,
        max((size for size in sizes if isinstance(size, int)), default=0),
        exact=len(attacks) == 1 or all(name in known for name in attacks),
    )


def per_example(run: Path, entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    """attack -> ``[n]`` bool, whether each image is classified correctly, ``clean`` included where it is on record.

    If evaluations differ in images, network or set, the most frequent combination is chosen.
    """
    return _outcomes_of(run, _same_kind(entries))


def _same_kind(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of the most frequent images, network and set, and ``clean`` on the same images."""
    kinds = Counter(_kind(entry) for name, entry in entries.items() if name != "clean")
    if not kinds:
        return {}
    kind = kinds.most_common(1)[0][0]
    return {
        name: entry
        for name, entry in entries.items()
        if (_kind(entry)[:2] == kind[:2] if name == "clean" else _kind(entry) == kind)
    }


def _kind(entry: Entry) -> tuple[str, str, str, str]:
    at = f"{number(entry.get('epsilon')):.9f} {entry.get('threat', '')}"
    return str(entry.get("data")), str(entry.get("weights")), str(entry.get("norm")), at


def _outcomes_of(run: Path, entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    recorded = {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry.get("file"), str) and isinstance(entry.get("data"), str) and entry["data"]
    }
    known = {name: arrays for name, entry in recorded.items() if (arrays := outcomes(run, entry)) is not None}
    labels: Sequence[np.ndarray] = [label for label, _ in known.values()]
    if any(not np.array_equal(labels[0], label) for label in labels):
        return {}  # equal fingerprints, but different labels: which are right is unknown
    return {name: correct for name, (_, correct) in known.items()}
