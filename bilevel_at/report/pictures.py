"""Images that a run's own attack has changed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..runs.record import Run
from .groups import Group
from .numbers import Spread
from .page import Figure, Part, Section

__all__ = ["pictures"]

MOST = 2


def pictures(groups: Sequence[Group], folder: Path) -> Section | None:
    """``figures/examples.png`` of the first run of each group, where the run drew it; at most two."""
    parts: list[Part] = []
    for place, group in enumerate(groups[:MOST]):
        run = group.runs[0]
        drawn = run.examples
        if drawn is None:
            continue
        path = folder / f"examples-{place}.png"
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a link there would lead the copy to another file
        shutil.copyfile(drawn, path)
        parts.append(Figure(path, _caption(group, run), f"Images, perturbations and their sums, {group.label}"))
        parts += _of_all(group, run)
    return Section("What the attack does", parts) if parts else None


def _attack(run: Run) -> str | None:
    """The attack of the figure, if it was recorded."""
    attacks = [a for a in run.part("options").get("attacks", []) if isinstance(a, str) and a != "clean"]
    return attacks[-1] if attacks else None


def _caption(group: Group, run: Run) -> str:
    attack = _attack(run)
    known = run.epsilon is not None or not run.threat.is_ball
    by = "an attack" if attack is None else attack
    at = f" {run.threat.at}" if known and attack is not None else ""
    return (
        f"{group.of_first}, best epoch: test images, the perturbation {by} finds for each{at}, and their sum, with "
        "what the network says of the first and the last."
    )


def _of_all(group: Group, run: Run) -> list[str]:
    attack = _attack(run)
    right = None if attack is None else group.accuracy("best", attack)
    if right is None:
        return []
    wrong = Spread(tuple(1 - value for value in right.values))
    seeds = f", over {len(right.values)} seeds" if len(right.values) > 1 else ""
    return [f"Of all test images {wrong}% are answered wrongly under {attack}{seeds}."]
