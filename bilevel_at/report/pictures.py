"""Images that a run's own attack has changed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..runs.record import Run
from .groups import Group
from .numbers import percent
from .page import Figure, Section

__all__ = ["pictures"]

MOST = 2


def pictures(groups: Sequence[Group], folder: Path) -> Section | None:
    """``figures/examples.png`` of the first run of each group, where the run drew it; at most two."""
    figures = []
    for place, group in enumerate(groups[:MOST]):
        run = group.runs[0]
        drawn = run.examples
        if drawn is None:
            continue
        path = folder / f"examples-{place}.png"
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a link there would lead the copy to another file
        shutil.copyfile(drawn, path)
        figures.append(Figure(path, _caption(group, run), f"Images, perturbations and their sums, {group.label}"))
    return Section("What the attack does", figures) if figures else None


def _caption(group: Group, run: Run) -> str:
    attacks = [a for a in run.part("options").get("attacks", []) if isinstance(a, str) and a != "clean"]
    entry = run.under_threat("best").get(attacks[-1]) if attacks else None
    begin = f"{run.name}, best epoch: test images, the perturbation"
    if entry is None:
        return f"{begin} an attack finds for each, and their sum, with what the network says of both."
    known = run.epsilon is not None or not run.threat.is_ball
    at = f" {run.threat.at}" if known else ""
    return (
        f"{begin} {attacks[-1]} finds for each{at}, and their sum, with what the network says. Of all test images "
        f"{percent(1 - entry['accuracy'])}% are answered wrongly under it."
    )
