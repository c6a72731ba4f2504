"""The comparison: clean accuracy, and accuracy under every attack in the threat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .groups import Group, by_threat
from .numbers import Spread, percent, span
from .page import Cell, Part, Section, Table
from .ranking import comparable, table_columns
from .union import WorstCase, worst_case
from .verdict import about_unions, caption, lead

__all__ = ["accuracy", "checkpoint"]


def accuracy(groups: Sequence[Group], folder: Path) -> Section | None:
    """A table for each threat: accuracies under different threats are not to be compared."""
    evaluated = [group for group in groups if group.checkpoints]
    threats = by_threat(evaluated)
    parts = [part for at, rivals in threats for part in _of_one_threat(rivals, at, alone=len(threats) == 1)]
    return Section("Accuracy", parts) if parts else None


def _of_one_threat(groups: Sequence[Group], at: str, alone: bool) -> list[Part]:
    """One row for each group and checkpoint, attacks from the weakest to the strongest, and the worst of them all."""
    rows = [(group, which) for group in groups for which in group.checkpoints]
    columns = table_columns(groups)
    unions = {(g.label, w): worst_case(g, w) for g, w in rows}
    union_shown = any(unions.values())
    differ = len({u.attacks for u in unions.values() if u}) > 1
    marked = _best(rows, columns, unions) if comparable(groups) else set()
    images = {_n(group, which) for group, which in rows}
    head = ["training", "checkpoint (epoch)", *columns]
    table = []
    for group, which in rows:
        cells = [Cell(group.label, aside=group.seeds(), rows=len(group.checkpoints)), Cell(checkpoint(group, which))]
        for name in columns:
            fewer = group.images(which, name) != {max(group.images(which), default=0)} and group.images(which, name)
            of_few = f"n = {span(f'{n:,}' for n in fewer)}" if fewer else ""
            cells.append(_cell(group, group.accuracy(which, name), (group.label, which, name) in marked, of_few))
        if union_shown:
            union = unions[group.label, which]
            aside = f"of {len(union.attacks)}" if union and differ else ""
            best = (group.label, which, "") in marked
            cells.append(_cell(group, union.spread if union else None, best, aside))
        table.append([*cells, *([] if len(images) == 1 else [Cell(_n(group, which))])])
    head += [*(["worst case of all"] if union_shown else []), *([] if len(images) == 1 else ["images"])]
    text = caption(groups, columns, images, at, bool(marked))
    return [
        lead(groups, columns) if alone else f"{at[0].upper()}{at[1:]}: {lead(groups, columns)}",
        Table(head, table, text, words=2),
        *about_unions([(g, w, u) for g, w in rows if (u := unions[g.label, w])]),
    ]


def checkpoint(group: Group, which: str) -> str:
    """'best (6)', 'last good (4–5)': with the epochs it is of."""
    at: list[int | None] = []
    for run in group.runs:
        if which == "best":
            at.append(run.best_epoch)
        elif which == "last":
            at.append(int(run.metrics[-1]["epoch"]) if run.metrics else None)
        elif which == "last_good":
            at.append(run.collapse.last_good if run.collapse else None)
    known = [epoch for epoch in at if epoch is not None]
    return which.replace("_", " ") + (f" ({span(known)})" if known else "")


def _cell(group: Group, spread: Spread | None, best: bool, aside: str = "") -> Cell:
    if spread is None:
        return Cell("–")
    have = len(spread.values)
    few = f"{have} of {len(group.runs)} seeds" if have < len(group.runs) else ""
    return Cell(str(spread), best, ", ".join(a for a in (aside, few) if a))


def _n(group: Group, which: str) -> str:
    return f"{max(sizes):,}" if (sizes := group.images(which)) else "–"


def _best(
    rows: Sequence[tuple[Group, str]], columns: Sequence[str], unions: dict[tuple[str, str], WorstCase | None]
) -> set[tuple[str, str, str]]:
    """(group, checkpoint, attack) of a column's highest mean among rows of one checkpoint; '' is the worst of all."""
    best: set[tuple[str, str, str]] = set()
    for which in dict.fromkeys(w for _, w in rows):
        same = [g for g, w in rows if w == which]
        for name in (*columns, ""):
            values = {}
            for g in same:
                union = unions[g.label, which]
                spread = g.accuracy(which, name) if name else union.spread if union else None
                if spread is not None and len(spread.values) == len(g.runs):
                    values[g.label] = float(percent(spread.mean))  # a tie is what a reader sees as one
            if not name and len({u.attacks for g in same if (u := unions[g.label, which])}) > 1:
                continue  # the worst of more attacks is lower
            if len(values) > 1:
                best |= {(label, which, name) for label, mean in values.items() if mean == max(values.values())}
    return best
