"""The page of method of ``parts.py``: what was held out, how many rows were tried, and what luck would do."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from differences import best_by_luck
from parts_results import FASTBAT, REFERENCES, Runs, chosen, machines, text_of
from parts_settings import CHEAP, NAMES, SETTINGS

__all__ = ["method"]


def luck(runs: Runs) -> list[str]:
    """How many were tried, and what the best of them would be by luck."""
    rows = [row.name for row in runs.rows if row.name not in REFERENCES]
    lines = []
    for reference, title in REFERENCES.items():
        gaps = [gap for row in rows if (gap := runs.difference(row, reference, CHEAP)) and gap.n > 1]
        if not gaps:
            continue
        error = statistics.median(gap.error for gap in gaps)
        usual, rare = (best_by_luck(len(gaps), error, q) for q in (0.5, 0.95))
        above = sum(gap.mean > rare for gap in gaps)
        lines.append(
            f"- {runs.setting.title}, beside {title}: {len(gaps)} rows, whose differences under {NAMES[CHEAP]} have a "
            f"standard error of {error:.1f} points (median). If all were equal in truth, the best of them would be "
            f"{usual:.1f} points above in half of such searches, and more than {rare:.1f} in one of twenty; "
            f"{above} of them are. At 95 %, {0.025 * len(gaps):.1f} rows would be expected to look better by luck, "
            f"and {sum(gap.clear and gap.mean > 0 for gap in gaps)} do."
        )
    return lines


def method(records: Sequence[Mapping[str, Any]]) -> str:
    """The page of method."""
    every = [runs for setting in SETTINGS.values() if (runs := Runs(records, setting)).records]
    lines = [
        "# How the parts were compared",
        "",
        f"`python benchmarks/parts.py --data-dir D --write docs/results`; {machines(records)}.",
        "",
        "For [parts.md](parts.md).",
        "",
        "- **Held out for choosing:** a tenth of the digits' training images (144) and 500 of CIFAR-10's, the same "
        "for every seed, attacked with PGD after each epoch. Rows are ranked by them, in their last epoch. Test images "
        "decide nothing: every row that was trained is on the page.",
        "- **Tried:** the rows of `benchmarks/parts_rows.py`. Settings are published ones, or were written down before "
        "the first run, but for these. After a part of the digits' seed 0: *from a gradient step, QUB*. After all of "
        "it: *remembered, twice the epochs*, *remembered, QUB, 1.4 × the epochs*, automatic damping. After three "
        "seeds: the rows that are never redrawn, and *remembered, adaptive, averaged, twice the epochs*. GradAlign's "
        "weight was set to 0.2, as in the digits' table, after one run with 2. Five compositions were looked at "
        "earlier on the digits' test images with three seeds (Fast-BAT's attacker with and without QUB, PGD-7 with and "
        "without, N-FGSM), which is why those are among the rows.",
        "- **Pairs:** the runs of a seed share initial weights, the order of the data and the held-out images, so "
        "differences are taken seed by seed.",
        "- **Not equal:** epochs are equal, operations are not; the column *cost* says how much, and *twice the "
        "epochs* what twice the operations would buy one step. One rate for all rows: none was tuned.",
        *luck_lines(every),
    ]
    return "\n".join(lines) + "\n"


def luck_lines(every: Sequence[Runs]) -> list[str]:
    lines = [line for runs in every for line in luck(runs)]
    for runs in every:
        best = chosen(runs)
        if best is None or not runs.of(FASTBAT):
            continue
        gaps = [
            f"{title}: {text_of(runs.difference(best.name, name, attack))} under {NAMES[attack]}"
            for name, title in REFERENCES.items()
            for attack in (CHEAP, "autoattack")
        ]
        lines.append(
            f"- {runs.setting.title}: held-out images choose **{best.name}** among the rows that cost at most what "
            f"Fast-BAT costs. Test images, points above {'; '.join(gaps)}."
        )
    return lines
