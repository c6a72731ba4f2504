"""The page of method of ``parts.py``: what was held out, how many rows were tried, and what luck would do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from differences import best_by_luck, better_and_worse, by_images, paired
from parts_results import FASTBAT, REFERENCES, Runs, affordable, chosen, machines, text_of
from parts_settings import CHEAP, NAMES, SETTINGS
from scipy import stats

__all__ = ["method"]


def luck(runs: Runs) -> list[str]:
    """How many were tried, and what the best of them would be by luck."""
    rows = [row.name for row in runs.rows if row.name not in REFERENCES]
    lines = []
    for reference, title in REFERENCES.items():
        gaps = [gap for row in rows if (gap := runs.difference(row, reference, CHEAP)) and gap.n >= runs.setting.seeds]
        if len(gaps) < 2:  # of one row there is no best
            continue
        error = statistics.median(gap.error for gap in gaps)
        usual, rare = (best_by_luck(len(gaps), error, q) for q in (0.5, 0.95))
        above = sum(gap.mean > rare for gap in gaps)
        lines.append(
            f"- {runs.setting.title}, beside {title}: {len(gaps)} rows with all {runs.setting.seeds} seeds, "
            f"whose differences under {NAMES[CHEAP]} have a standard error of {error:.1f} points (median). If all were "
            f"equal in truth and independent, the best would be {usual:.1f} points above in half of such searches, "
            f"and more than {rare:.1f} in one of twenty; "
            f"{above} rows are above that. At 95 %, {0.025 * len(gaps):.1f} rows would be expected to look better by "
            f"luck, and {better_and_worse(gaps)[0]} do."
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
        "for every seed, attacked with PGD after each epoch. Rows are ranked by them, in their last epoch. No row is "
        "ranked, left out or named as the best by test images, and every row that was trained is on the page; but what "
        "was added later, below, was added when test accuracies of earlier runs could be seen.",
        "- **Tried:** the rows of `benchmarks/parts_rows.py`. Settings are published ones, or were written down before "
        "the first run, but for these. After a part of the digits' seed 0: *from a gradient step, QUB*. After all of "
        "it: *remembered, twice the epochs*, *remembered, QUB, 1.4 × the epochs*, automatic damping. After three "
        "seeds: the rows that are never redrawn, and *remembered, adaptive, averaged, twice the epochs*. The row "
        "*ATAS, twice the epochs* was there from the start, and became a reference after the digits' seed 0. "
        "GradAlign's weight was set to 0.2, as in the digits' table, after one run with 2. Five compositions were "
        "looked at earlier on the digits' test images with three seeds (Fast-BAT's attacker with and without QUB, "
        "PGD-7 with and without, N-FGSM), which is why those are among the rows.",
        "- **Pairs:** the runs of a seed share initial weights, the order of the data and the held-out images, so "
        "differences are taken seed by seed.",
        "- **Not equal:** epochs are equal, operations are not; the column *cost* says how much, and *twice the "
        "epochs* what twice the operations would buy one step. One rate for all rows: none was tuned.",
        "- **Over seeds, not images:** standard errors are over seeds, and all runs of a data set attack the same test "
        f"images. What other images would give is not in them. The number of images alone gives the accuracy of one "
        f"network under {NAMES[CHEAP]} a standard error of {images_alone(every)}; a part of it cancels in differences.",
        "- **AutoAttack** takes as long as everything else, and was made first for the references, what held-out "
        f"images choose, and the rows that these are made of. With every seed: {'; '.join(map(strongly, every))}.",
        "- **By luck**, below, is meant for independent rows. They share what they are compared with, which makes the "
        f"best of them less; and standard errors of few seeds are too small in the median ({too_small()}), which makes "
        "it more.",
        *luck_lines(every),
    ]
    return "\n".join(lines) + "\n"


def strongly(runs: Runs) -> str:
    """How many rows have AutoAttack with every seed."""
    whole = sum(len(runs.accuracy(row.name, "autoattack")) >= runs.setting.seeds for row in runs.rows)
    return f"{whole} of {len(runs.rows)} rows ({runs.setting.title})"


def images_alone(every: Sequence[Runs]) -> str:
    """The standard error that the number of test images gives the accuracy of Fast-BAT, for each data set."""
    texts = []
    for runs in every:
        of = [r["results"][CHEAP] for r in runs.of(FASTBAT) if CHEAP in r.get("results", {})]
        if of:
            n = of[0]["n"]
            error = by_images(100 * statistics.mean(result["accuracy"] for result in of), n)
            texts.append(f"{error:.1f} points ({runs.setting.title}, {n:,} images)")
    return ", ".join(texts) or "–"


def too_small() -> str:
    """How much the median of a standard deviation of few normal numbers is below the truth."""
    counts = sorted({setting.seeds for setting in SETTINGS.values()})
    shares = [1 - math.sqrt(float(stats.chi2.median(n - 1)) / (n - 1)) for n in counts]
    return ", ".join(f"by {100 * share:.0f} % of {n} seeds" for n, share in zip(counts, shares, strict=True))


def without_first_seed(runs: Runs) -> str:
    """Better and worse than the reference that was made one after seed 0, in the other seeds."""
    name, title = list(REFERENCES.items())[-1]
    gaps = [
        gap
        for row in affordable(runs)
        if (gap := paired(*(_others(runs.accuracy(which, CHEAP)) for which in (row.name, name))))
        and gap.n >= runs.setting.seeds - 1 > 1
    ]
    better, worse = better_and_worse(gaps)
    return (
        f"- {runs.setting.title}, seed 0 left out: of {len(gaps)} other rows that cost at most what Fast-BAT costs "
        f"{better} are better than {title} under {NAMES[CHEAP]}, {worse} worse."
    )


def _others(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if seed != 0}


def luck_lines(every: Sequence[Runs]) -> list[str]:
    lines = [line for runs in every for line in luck(runs)]
    lines += [without_first_seed(runs) for runs in every if runs.setting.name == "digits"]
    for runs in every:
        best = chosen(runs)
        if best is None or not runs.of(FASTBAT):
            continue
        gaps = [
            f"{title} {text_of(gap)} under {NAMES[attack]}"
            for name, title in REFERENCES.items()
            for attack in (CHEAP, "autoattack")
            if (gap := runs.difference(best.name, name, attack))
        ]
        lines.append(
            f"- {runs.setting.title}: held-out images choose **{best.name}** among the rows, but for the "
            f"references, that cost at most what Fast-BAT costs. Test images, points above: {'; '.join(gaps)}."
        )
    return lines
