"""What ``parts.py`` has shown of a data set, in a few lines that follow from its runs."""

from __future__ import annotations

from collections.abc import Iterable

from differences import Difference, better_and_worse
from parts_results import FASTBAT, REFERENCES, Runs, affordable, chosen, text_of
from parts_rows import BASE, PARTS, ROWS
from parts_settings import CHEAP, NAMES

__all__ = ["summary"]


def summary(runs: Runs) -> list[str]:
    """Bullets: what adds, what takes away, what makes no difference that is shown, and what the search gave."""
    seeds = runs.setting.seeds
    gaps = {row.name: gap for row in PARTS if row.beside and (gap := runs.difference(row.name, row.beside, CHEAP))}
    gaps = {name: gap for name, gap in gaps.items() if gap.n >= seeds}
    adds = {name: gap for name, gap in gaps.items() if gap.clear and gap.mean > 0}
    takes = {name: gap for name, gap in gaps.items() if gap.clear and gap.mean < 0}
    lines = []
    if adds:
        lines.append(
            f"- **Adds** to {BASE}, or to the row in parentheses, in points under {NAMES[CHEAP]}: {_listed(adds)}."
        )
    if takes:
        lines.append(f"- **Takes away**, likewise: {_listed(takes)}.")
    if unclear := [name for name in gaps if name not in adds and name not in takes]:
        lines.append(f"- **No difference that {seeds} seeds show:** {'; '.join(unclear)}.")
    if adds or takes:
        lines.append(f"- Of {len(gaps)} exchanges without any effect {0.05 * len(gaps):.1f} would be clear by luck.")
    return lines + _search(runs)


def _search(runs: Runs) -> list[str]:
    """How the references compare with Fast-BAT, and the rows that cost at most what it costs with each reference."""
    lines = []
    for reference, title in REFERENCES.items():
        gaps = {attack: runs.difference(reference, FASTBAT, attack) for attack in NAMES}
        shown = [f"{text_of(gap)} ({NAMES[attack]})" for attack, gap in gaps.items() if gap and gap.n > 1]
        if reference != FASTBAT and shown:
            lines.append(
                f"- **{title}** costs {runs.cost(reference):.2f} of what Fast-BAT costs, and its accuracy differs from "
                f"Fast-BAT's by {', '.join(shown)}."
            )
    for reference, title in REFERENCES.items():
        gaps = [
            gap
            for row in affordable(runs)
            if (gap := runs.difference(row.name, reference, CHEAP)) and gap.n >= runs.setting.seeds
        ]
        if gaps:
            better, worse = better_and_worse(gaps)
            lines.append(
                f"- Other rows with all {runs.setting.seeds} seeds that cost at most what Fast-BAT costs: "
                f"{len(gaps)}. Better than {title} (cost {runs.cost(reference):.2f}) under {NAMES[CHEAP]}: "
                f"**{better}**; worse: {worse}; the seeds do not "
                f"say: {len(gaps) - better - worse}."
            )
    best = chosen(runs)
    if best is None:
        return lines
    gaps_of = [(title, runs.difference(best.name, reference, CHEAP)) for reference, title in REFERENCES.items()]
    words = ", ".join(f"{text_of(gap)} above {title}" for title, gap in gaps_of if gap)
    return [*lines, f"- Held-out images choose **{best.name}** among these other rows: {words}."]


def _listed(gaps: dict[str, Difference]) -> str:
    """Largest first."""
    ranked: Iterable[tuple[str, Difference]] = sorted(gaps.items(), key=lambda item: -abs(item[1].mean))
    return "; ".join(f"{_beside(name)} {gap.mean:+.1f} ± {gap.error:.1f}" for name, gap in ranked)


def _beside(name: str) -> str:
    """The row's name, with the row it is compared with where that is not the base."""
    beside = ROWS[name].beside
    return name if beside == BASE else f"{name} ({beside})"
