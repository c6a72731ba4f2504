"""The page and the figure of ``parts.py``, from its lines of JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from differences import Difference, best_by_luck, mean_and_spread, paired
from parts_rows import COMPOSITIONS, PARTS, Row
from parts_settings import CHEAP, NAMES, SETTINGS, Setting

__all__ = ["Runs", "write_page"]

FASTBAT, ATAS = "implicit term × 0.1 (Fast-BAT)", "remembered, adaptive"
REFERENCES = {FASTBAT: "Fast-BAT", ATAS: "ATAS", f"{ATAS}, twice the epochs": "ATAS, twice the epochs"}


class Runs:
    """The lines of one setting."""

    def __init__(self, records: Sequence[Mapping[str, Any]], setting: Setting) -> None:
        self.setting = setting
        self.records = [r for r in records if r["setting"] == setting.name]

    def of(self, row: str) -> list[Mapping[str, Any]]:
        return [r for r in self.records if r["row"] == row]

    def accuracy(self, row: str, attack: str) -> dict[int, float]:
        """In %, by seed, of the runs that were attacked so."""
        return {
            r["seed"]: 100 * r["results"][attack]["accuracy"]
            for r in self.of(row)
            if attack in r.get("results", {}) and self._whole(r, attack)
        }

    def _whole(self, record: Mapping[str, Any], attack: str) -> bool:
        """Whether it is on as many images as the setting asks for."""
        return bool(record["results"][attack]["n"] >= self.setting.attacks[attack])

    def held_out(self, row: str) -> dict[int, float]:
        """Accuracy on held-out images under the attack of training's looks, last epoch, in %, by seed."""
        return {r["seed"]: 100 * r["epochs"]["robust"][-1] for r in self.of(row) if "epochs" in r}

    def cost(self, row: str) -> float | None:
        """Counted operations of training, as a multiple of Fast-BAT's."""
        mine, fastbat = ([r["operations"] for r in self.of(name) if r.get("operations")] for name in (row, FASTBAT))
        return mine[0] / fastbat[0] if mine and fastbat else None

    def difference(self, row: str, beside: str, attack: str) -> Difference | None:
        return paired(self.accuracy(row, attack), self.accuracy(beside, attack))

    @property
    def rows(self) -> list[Row]:
        """Those that have a line, in their order."""
        return [row for row in (*PARTS, *COMPOSITIONS) if self.of(row.name)]


def _text(value: Any) -> str:
    return "–" if value is None else str(value)


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
        cells += [row.beside or "–", *(_text(gap) for gap in gaps)]
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
    """All compositions by held-out accuracy, beside Fast-BAT and ATAS."""
    rows = [row for row in runs.rows if row.name not in REFERENCES]
    ranked = sorted(rows, key=lambda row: -statistics.mean(runs.held_out(row.name).values() or [0.0]))
    header = ["row", "cost", "held out", "AutoAttack"]
    header += [f"{which} above {name}" for name in REFERENCES.values() for which in ("nearest", "AutoAttack")]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in ranked[:12]:
        cells = [row.name, _cost(runs.cost(row.name)), mean_and_spread(runs.held_out(row.name))]
        cells.append(mean_and_spread(runs.accuracy(row.name, "autoattack")))
        for name in REFERENCES:
            cells += [_text(runs.difference(row.name, name, attack)) for attack in (CHEAP, "autoattack")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def chosen(runs: Runs) -> Row | None:
    """The row with the best held-out accuracy among those that cost at most what Fast-BAT costs."""
    rows = [row for row in runs.rows if row.name not in REFERENCES and (runs.cost(row.name) or 9) <= 1.001]
    return max(rows, key=lambda row: statistics.mean(runs.held_out(row.name).values() or [0.0]), default=None)


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


def machines(records: Sequence[Mapping[str, Any]]) -> str:
    """When, on what and with what."""
    made = {
        (r["date"], r["device"], f"torch {r['versions']['torch']}, Python {r['versions']['python']}")
        for r in records
        if "date" in r
    }
    dates = sorted({date for date, *_ in made})
    others = sorted({f"{device}, one thread a run, {versions}" for _, device, versions in made})
    return f"{dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}, {'; '.join(others)}" if made else "no runs"


def images(setting: Setting) -> str:
    counts = {NAMES[attack]: n for attack, n in setting.attacks.items() if n}
    if not counts:
        return "all 360 test images"
    return ", ".join(f"{name} on the first {n:,} test images" for name, n in counts.items())


FIGURE = (
    "![What each part adds under a strong attack](parts.png)",
    "",
    "*What to see: each dot is one part exchanged, the bar its 95 % interval; right of the line it adds to the accuracy "
    "under nearest-40-3-2 of the row that it is compared with. Filled where the interval leaves out zero.*",
)


def page(records: Sequence[Mapping[str, Any]], conclusions: str, drawn: bool) -> str:
    """The page."""
    every = [Runs(records, setting) for setting in SETTINGS.values()]
    every = [runs for runs in every if runs.records]
    lines = [
        "# What each part is worth",
        "",
        f"`python benchmarks/parts.py --data-dir D --write docs/results`; {machines(records)}.",
        "",
        *([conclusions.strip(), ""] if conclusions.strip() else []),
        "One recipe; each row differs from the row in the column *beside* by one part, and is "
        "[`problems/composed.py`](../../problems/composed.py) with the flags in "
        "[`benchmarks/parts_rows.py`](../../benchmarks/parts_rows.py). *Cost*: counted operations of training as a "
        "multiple of Fast-BAT's. Accuracy in % of the last epoch, mean ± standard deviation over seeds. Differences: "
        "points, mean ± standard error over seeds that both rows have; **bold** where the 95 % interval (Student's t) "
        "leaves out zero. *nearest* is `nearest-40-3-2`, an attack that leaves what AutoAttack leaves to a few tenths "
        "([nearest.md](nearest.md)). A dash: not measured. How rows were chosen, and what luck would do: "
        "[parts-method.md](parts-method.md).",
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
        lines += ["", *table(runs, [row for row in runs.rows if row in PARTS])]
        lines += failures(runs)
        if any(row in COMPOSITIONS for row in runs.rows):
            lines += ["", "Compositions:", "", *table(runs, [row for row in runs.rows if row in COMPOSITIONS])]
        if runs.of(FASTBAT):
            lines += ["", "The twelve best by held-out images, beside Fast-BAT and ATAS:", "", *search(runs)]
    return "\n".join(lines) + "\n"


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
        "- **Held out for choosing:** a tenth of the digits' training images (144) and 500 of CIFAR-10's, others for "
        "each seed, attacked with PGD after each epoch. Rows are ranked by them, in their last epoch. Test images "
        "decide nothing: every row that was trained is on the page.",
        "- **Tried:** the rows of `benchmarks/parts_rows.py`. Settings are published ones, or were written down before "
        "the first run, but for these: *from a gradient step, QUB* was added after a part of the digits' seed 0, and "
        "*remembered, twice the epochs*, *remembered, QUB, 1.4 × the epochs* and automatic damping after all of it; "
        "GradAlign's weight was set to 0.2, as in the digits' table, after one run with 2. Five compositions were "
        "looked at earlier on the digits' test images with three seeds (Fast-BAT's attacker with and without QUB, PGD-7 "
        "with and without, N-FGSM), which is why those are among the rows.",
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
            f"{title}: {_text(runs.difference(best.name, name, attack))} under {NAMES[attack]}"
            for name, title in REFERENCES.items()
            for attack in (CHEAP, "autoattack")
        ]
        lines.append(
            f"- {runs.setting.title}: held-out images choose **{best.name}** among the rows that cost at most what "
            f"Fast-BAT costs. Test images, points above {'; '.join(gaps)}."
        )
    return lines


def write_page(records: Sequence[Mapping[str, Any]], target: Path) -> None:
    """parts.md, parts-method.md and parts.png; the text of ``parts-conclusions.txt``, where there is one, at the top."""
    from parts_figure import draw

    place = target / "parts-conclusions.txt"
    conclusions = place.read_text(encoding="utf-8") if place.exists() else ""
    drawn = draw([Runs(records, setting) for setting in SETTINGS.values()], target / "parts.png")
    (target / "parts.md").write_text(page(records, conclusions, drawn), encoding="utf-8")
    (target / "parts-method.md").write_text(method(records), encoding="utf-8")
