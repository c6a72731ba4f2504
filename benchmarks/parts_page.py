"""The page and the figure of ``parts.py``, from its lines of JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from differences import mean_and_spread
from parts_figure import draw
from parts_method import method
from parts_results import FASTBAT, REFERENCES, Runs, machines, text_of
from parts_rows import COMPOSITIONS, PARTS, Row
from parts_settings import CHEAP, NAMES, SETTINGS, Setting
from parts_summary import summary

__all__ = ["write_page"]


def _cost(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def table(runs: Runs, rows: Sequence[Row]) -> list[str]:
    """The rows with accuracies, and the difference from the row that each is compared with."""
    header = ["row", "part", "cost", *NAMES.values(), "beside", "nearest: difference", "AutoAttack: difference"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    rows = [row for row in rows if not all("failed" in r for r in runs.of(row.name))]
    for row in rows:
        cells = [row.name, row.part, _cost(runs.cost(row.name))]
        cells += [mean_and_spread(runs.accuracy(row.name, attack)) for attack in NAMES]
        gaps = [runs.difference(row.name, row.beside, attack) for attack in (CHEAP, "autoattack")]
        cells += [row.beside or "–", *(text_of(gap) for gap in gaps)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def failures(runs: Runs) -> list[str]:
    """A line for each row whose training failed."""
    lines = []
    for row in runs.rows:
        failed = [r for r in runs.of(row.name) if "failed" in r]
        if failed:
            seeds = ", ".join(str(r["seed"]) for r in failed)
            lines += ["", f"{row.name}: training failed with seed {seeds}: {failed[0]['failed'][:200]}"]
    return lines


def search(runs: Runs) -> list[str]:
    """The best rows by held-out accuracy, but for the references, beside Fast-BAT and ATAS."""
    rows = [row for row in runs.rows if row.name not in REFERENCES]
    ranked = sorted(rows, key=lambda row: -statistics.mean(runs.held_out(row.name).values() or [0.0]))
    header = ["row", "cost", "held out", "AutoAttack"]
    header += [f"{which} above {name}" for name in REFERENCES.values() for which in ("nearest", "AutoAttack")]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in ranked[:12]:
        cells = [row.name, _cost(runs.cost(row.name)), mean_and_spread(runs.held_out(row.name))]
        cells.append(mean_and_spread(runs.accuracy(row.name, "autoattack")))
        for name in REFERENCES:
            cells += [text_of(runs.difference(row.name, name, attack)) for attack in (CHEAP, "autoattack")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def references(runs: Runs) -> str:
    """What the references, which are not in the search's table, have on held-out images."""
    cells = [f"{title} {mean_and_spread(runs.held_out(name))}" for name, title in REFERENCES.items() if runs.of(name)]
    return f"Of the references, which are not ranked, on held-out images: {'; '.join(cells)}."


def images(setting: Setting) -> str:
    counts = {NAMES[attack]: n for attack, n in setting.attacks.items() if n}
    if not counts:
        return "all 360 test images"
    return ", ".join(f"{name} on the first {n:,} test images" for name, n in counts.items())


FIGURE = (
    "![What each part adds under a strong attack](parts.png)",
    "",
    "*What to see: each dot is one part exchanged, the bar its 95 % interval; right of the line it adds to the "
    "accuracy under nearest-40-3-2 of the row that it is compared with (column beside of the tables: for most parts "
    "one sign step, for compositions the row that lacks the last part). Filled where the interval leaves out zero; "
    "without a bar: one seed; an arrow: beyond the axis.*",
)


ROWS_MEAN = (
    "The base, *one sign step*: δ is a sign step of ε from a uniform draw z in the ball, projected onto it; attacks "
    "in eval mode; cross-entropy. *Anchor*: z is something else: *remembered*, the image's own perturbation of the "
    "epoch before, drawn anew every 10 epochs (ATTA); *noise*, uniform in the ball of 2 ε, and not projected "
    "(N-FGSM); a *corner* of the ball; one *sign step* (of ε/2) or *gradient step* (of 1/λ) before. *Unsigned*: a "
    "step of 1/λ along the gradient itself (Fast-BAT's). *Adaptive*: a step size for each image (ATAS). *PGD-K*: K "
    "steps. *QUB*: a quadratic upper bound of the loss; *AWP*, *GradAlign*, *TRADES' loss*: as in their files "
    "([methods.md](../methods.md)). *Implicit term × k*: a weight of k λ in Fast-BAT's hypergradient, where the exact "
    "one has weight 1 ([implicit.md](implicit.md)); *in every 4th step*: in each with probability 1/4, times 4.",
)


def page(records: Sequence[Mapping[str, Any]], drawn: bool) -> str:
    """The page."""
    every = [Runs(records, setting) for setting in SETTINGS.values()]
    every = [runs for runs in every if runs.records]
    lines = [
        "# What each part is worth",
        "",
        f"`python benchmarks/parts.py --data-dir D --write docs/results`; {machines(records)}.",
        "",
        "One recipe; each row differs from the row in the column *beside* by one part, and is "
        "[`problems/composed.py`](../../problems/composed.py) with the flags in "
        "[`benchmarks/parts_rows.py`](../../benchmarks/parts_rows.py). *Cost*: counted operations of training as a "
        "multiple of Fast-BAT's. Accuracy in % of the last epoch, mean ± standard deviation over seeds. Differences: "
        "points, mean ± standard error over seeds that both rows have; **bold** where the 95 % interval (Student's t) "
        "of three seeds or more leaves out zero, which one in twenty does by luck. *nearest* is `nearest-40-3-2`, an "
        "attack that leaves what AutoAttack leaves to a few tenths ([nearest.md](nearest.md)). A dash: not measured; "
        "without ±: one seed. How rows were chosen, and what luck would do: [parts-method.md](parts-method.md).",
        "",
        *ROWS_MEAN,
        "",
        *(FIGURE if drawn else []),
    ]
    for runs in every:
        seeds = sorted({r["seed"] for r in runs.records})
        lines += [
            "",
            f"## {runs.setting.title}",
            "",
            f"{runs.setting.about} Seeds {seeds[0]}–{seeds[-1]}; {images(runs.setting)}.",
        ]
        lines += ["", *summary(runs), "", *table(runs, [row for row in runs.rows if row in PARTS])]
        lines += failures(runs)
        if any(row in COMPOSITIONS for row in runs.rows):
            lines += ["", "Compositions:", "", *table(runs, [row for row in runs.rows if row in COMPOSITIONS])]
        if runs.of(FASTBAT):
            lines += ["", "The twelve best by held-out images, beside Fast-BAT and ATAS:", "", *search(runs)]
            lines += ["", references(runs)]
    return "\n".join(lines) + "\n"


def write_page(records: Sequence[Mapping[str, Any]], target: Path) -> None:
    """parts.md, parts-method.md and parts.png."""
    drawn = draw([Runs(records, setting) for setting in SETTINGS.values()], target / "parts.png")
    (target / "parts.md").write_text(page(records, drawn), encoding="utf-8")
    (target / "parts-method.md").write_text(method(records), encoding="utf-8")
