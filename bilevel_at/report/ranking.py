"""Which attacks there are, which is the strongest, and whether rows can be ranked at all."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from .groups import Group, all_runs

__all__ = ["CLEAN", "comparable", "on_all_images", "strongest", "table_columns"]

CLEAN = "clean"


def table_columns(groups: Sequence[Group]) -> list[str]:
    """``clean``, then the attacks in the threat by their mean accuracy over the rows, the strongest last."""
    accuracies: dict[str, list[float]] = {}
    for group in groups:
        for which in group.checkpoints:
            for name in dict.fromkeys(n for run in group.runs for n in run.under_threat(which)):
                spread = group.accuracy(which, name)
                if spread is not None:
                    accuracies.setdefault(name, []).append(spread.mean)
    attacks = sorted((name for name in accuracies if name != CLEAN), key=lambda name: -fmean(accuracies[name]))
    return [CLEAN, *attacks] if CLEAN in accuracies else attacks


def strongest(groups: Sequence[Group]) -> str | None:
    """The strongest attack that every group was put to at its main checkpoint, on all the images it has."""
    shared = [name for name in table_columns(groups) if name != CLEAN and all(on_all_images(g, name) for g in groups)]
    return shared[-1] if shared else None


def on_all_images(group: Group, attack: str) -> bool:
    """Whether the group's main checkpoint has that attack, on no fewer images than any other of its attacks."""
    if group.main is None or group.accuracy(group.main, attack) is None:
        return False
    sizes = group.images(group.main)
    return not sizes or group.images(group.main, attack) == {max(sizes)}


def comparable(groups: Sequence[Group]) -> bool:
    """Whether the groups can be ranked: several of them, of one threat, evaluated on the same images."""
    runs = all_runs(groups)
    entries = [entry for run in runs for which in run.results for entry in run.under_threat(which).values()]
    images = {(entry.get("data"), entry.get("n")) for entry in entries}
    return len(groups) > 1 and len({run.threat.key for run in runs}) == 1 and len(images) == 1
