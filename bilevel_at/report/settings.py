"""What was trained: the solver, the lower level and the batches, as ``config.json`` has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.record import Run
from .groups import Group
from .numbers import radius
from .page import Cell, Section, Table

__all__ = ["facts", "settings"]

MOST = 120  # characters of a setting
NAMES = ("solver", "implicit weight", "anchor", "direction", "step", "batch size")


def facts(run: Run) -> dict[str, str]:
    """Settings by name; those that the run does not have are left out.

    Runs of earlier versions have no ``lower`` in their configuration; the arguments of their problem say part of it.
    """
    solver, options, lower = run.part("solver"), run.part("options"), run.part("lower") or run.part("problem")
    images = options.get("batch_size")
    times = options.get("accumulate", 1)
    known = {
        "solver": solver.get("name"),
        "implicit weight": solver.get("ig_weight", solver.get("inner_ig_weight")),
        "anchor": lower.get("anchor"),
        "direction": lower.get("direction"),
        "step": lower.get("step"),
        "batch size": f"{times} × {images}" if times not in (1, None) and images is not None else images,
    }
    return {name: _text(known[name]) for name in NAMES if known[name] is not None}


def _text(value: Any) -> str:
    text = radius(value) if isinstance(value, float) else str(value)
    return text if len(text) <= MOST else text[: MOST - 1] + "…"


def settings(groups: Sequence[Group], folder: Path) -> Section | None:
    """A table of the settings in which several trainings differ; of one training the page's head has them all."""
    each = [facts(group.runs[0]) for group in groups]
    names = [name for name in NAMES if any(name in known for known in each)]
    differ = [name for name in names if len({known.get(name) for known in each}) > 1]
    if len(groups) < 2 or not differ:
        return None
    rows = [
        [Cell(group.label), *(Cell(known.get(name, "–")) for name in differ)]
        for group, known in zip(groups, each, strict=True)
    ]
    caption = "Settings in which the trainings differ, from config.json. The step is 1/λ."
    return Section("What was trained", [Table(["training", *differ], rows, caption, words=len(differ) + 1)])
