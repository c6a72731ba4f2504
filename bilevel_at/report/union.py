"""The worst case over all attacks that were run: an example counts as correct if no attack breaks it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..runs.headline import per_example
from ..runs.headline import worst_case as of_run
from .groups import Group
from .numbers import Spread

__all__ = ["WorstCase", "headline", "worst_case"]


@dataclass(frozen=True)
class WorstCase:
    """Accuracy under the union of attacks.

    Args:
        spread: the accuracies over seeds.
        attacks: the names of the attacks.
        n: the number of images.
        exact: whether the outcome of every example is on record for all attacks.
    """

    spread: Spread
    attacks: tuple[str, ...]
    n: int
    exact: bool = True


def worst_case(group: Group, which: str) -> WorstCase | None:
    """Accuracy under the union of those attacks in the threat with which every run of the group was evaluated.

    Args:
        group: the runs, whose ``evaluation/WHICH/*.npz`` are read.
        which: the checkpoint's name.

    Returns:
        None if a run lacks the outcomes of at least two attacks on the same images.

    Raises:
        InputError: if a file is damaged.
    """
    outcomes = [per_example(run.path, run.under_threat(which)) for run in group.runs]
    common = [name for name in outcomes[0] if name != "clean" and all(name in each for each in outcomes)]
    return _of(group, which, common) if len(common) > 1 else None


def headline(groups: Sequence[Group], attacks: Collection[str]) -> dict[str, WorstCase]:
    """Group -> the worst case, at its main checkpoint, of those of the attacks that every run of every group has.

    Args:
        groups: of one threat.
        attacks: the names of attacks.
    """
    chosen: Collection[str] = attacks
    while chosen:
        worst = {g.label: _of(g, g.main, chosen) for g in groups if g.main is not None}
        common = [name for name in chosen if all(w is not None and name in w.attacks for w in worst.values())]
        if len(common) == len(chosen):
            return {label: w for label, w in worst.items() if w is not None}
        chosen = common
    return {}


def _of(group: Group, which: str, attacks: Collection[str]) -> WorstCase | None:
    each = [of_run(run.path, run.under_threat(which), attacks) for run in group.runs]
    known = [worst for worst in each if worst is not None]
    if not known:
        return None
    common = tuple(name for name in known[0].attacks if all(name in worst.attacks for worst in known))
    spread = Spread(tuple(worst.accuracy for worst in known))
    return WorstCase(spread, common, max(worst.n for worst in known), all(worst.exact for worst in known))
