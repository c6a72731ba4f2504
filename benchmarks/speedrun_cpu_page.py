"""The page of ``speedrun_cpu.py``, from its lines of JSON and its calibration alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from differences import LEAST, mean_and_spread, paired
from lines import read
from parts_results import machines
from speedrun_cpu_columns import BASELINES, Column, Record, columns_of
from speedrun_cpu_steps import CALIBRATION, Rows, seconds_of
from speedrun_cpu_steps import read as read_calibration
from speedrun_page import CHEAP, STRONG

from bilevel_at.errors import InputError

__all__ = ["write_page"]

NAMES = {CHEAP: CHEAP, STRONG: "AutoAttack"}


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _tflop(record: Record) -> str:
    return f"{record['operations'] * 1e-12:.0f}"


def summary(columns: Sequence[Column]) -> list[str]:
    """What held-out images choose for each time, beside the baselines."""
    header = ["two cores for", "chosen by held-out images", "its TFLOP", "chosen", *BASELINES]
    lines = [_row(header), "|" + "---|" * len(header)]
    for column in columns:
        best = column.best
        if best is None:
            continue
        note = f" ({column.lacks})" if column.lacks else ""
        cells = [f"{column.budget:g} minutes", f"{best}{note}", _tflop(column.rows[best][0])]
        for name in (best, *BASELINES):
            cheap, strong = (mean_and_spread(column.accuracy(name, attack)) for attack in (CHEAP, STRONG))
            cells.append(strong if strong != "–" or cheap == "–" else f"– ({cheap})")
        lines.append(_row(cells))
    return lines


def table(column: Column) -> list[str]:
    """Every composition of a time, by accuracy on held-out images."""
    best = column.best
    header = ["composition", "epochs", "planned s", "taken s", "TFLOP", "held out, PGD-10", "clean", *NAMES.values()]
    attack = STRONG if all(column.accuracy(name, STRONG) for name in column.rows) else CHEAP
    header.append(f"chosen less this, {NAMES[attack]}")
    lines = [_row(header), "|" + "---|" * len(header)]
    for name in sorted(column.rows, key=lambda name: -statistics.mean(column.held_out(name).values())):
        rows = column.rows[name]
        first = rows[0]
        taken = {r["seed"]: r["processor_seconds"] for r in rows if r["processor_seconds"] is not None}
        gap = None if best in (None, name) else paired(column.accuracy(best, attack), column.accuracy(name, attack))
        cells = [f"{name}: `{first['text']}`", str(len(first["epochs"]["robust"])), f"{first['planned']:.0f}"]
        cells += [f"{statistics.mean(taken.values()):.0f}" if taken else "–", _tflop(first)]
        cells.append(mean_and_spread(column.held_out(name)))
        cells += [mean_and_spread(column.accuracy(name, which)) for which in ("clean", CHEAP, STRONG)]
        lines.append(_row([*cells, "–" if gap is None else str(gap)]))
    lines += [
        _row([f"{r['composition']}: `{r['text']}`", f"failed, seed {r['seed']}: {r['failed']}", *["–"] * 8])
        for r in column.failed
    ]
    return lines


def remarks(column: Column) -> str:
    """What the choice is worth, in a few sentences."""
    best = column.best
    if best is None:
        return "No composition was trained to its end."
    seeds = len(column.rows[best])
    text = f"Held-out images choose **{best}**{f'; {column.lacks}' if column.lacks else ''}."
    if column.level:
        level = "; ".join(column.level)
        text += f" They do not tell it from {level} (less than two standard errors of the difference)."
    text += (
        f" The number of images alone gives accuracies a standard error of {column.error(best):.1f} points (held out) "
        f"and {column.error(best, CHEAP):.1f} (test)."
    )
    if seeds < LEAST:
        text += f" {seeds} seed{'s' if seeds > 1 else ''}: no difference between rows is claimed."
    return text


def calibration(rows: Rows) -> list[str]:
    """Seconds of a step, with their spread."""
    header = ["composition", "processor seconds of a step", "smallest … largest", "repeats"]
    lines = [_row(header), "|" + "---|" * len(header)]
    for name, row in rows.items():
        ends = f"{min(row['seconds']):.3f} … {max(row['seconds']):.3f}"
        beside = f"{name} (later, scaled by {row['beside']})" if row["beside"] else name
        lines.append(_row([beside, f"{seconds_of(row):.3f}", ends, str(len(row["seconds"]))]))
    return lines


def _number(rows: Sequence[Mapping[str, Any]], what: str) -> str:
    """What all rows have in common, or all that there are."""
    return " or ".join(f"{value:,}" for value in sorted({row[what] for row in rows}))


def page(columns: Sequence[Column], rows: Rows) -> str:
    """The page."""
    records = [record for column in columns for record in column.records]
    lines = [
        "# The best network for a few minutes of two cores",
        "",
        f"`python benchmarks/speedrun_cpu.py --data-dir D --write docs/results`; {machines(records)}.",
        "",
    ]
    if any(record["proof"] for record in records):
        lines += ["**A proof that the script works, at reduced size; no figure here is a result.**", ""]
    lines += [
        "The rehearsal of the GPU's table: `benchmarks/speedrun.py` looks for the shortest training of a "
        "PreActResNet-18 to 45 %, 48 % and 50 % under AutoAttack on one GPU, and writes `speedrun-gpu.md` "
        "([how](../methods.md#training)). Here a small residual network has a fixed time of two cores instead; nothing "
        "says that the order of rows is the same there.",
        "",
        f"CIFAR-10, all training images less {_number(records, 'held_out')} that are held out, ε = 8/255 in ℓ∞. One "
        "recipe for all (`RECIPE` in the script): batches of 128, rate in one cycle with peak 0.2, weight decay 5e-4, "
        "crops and flips, bfloat16; nothing was tuned, and attacks have the batch statistics (train or eval mode) that "
        "their file has. A time of m minutes is 2 · 60 · m processor seconds of training epochs on one thread: two "
        "runs side by side fill two cores. No clock stops a run; it has as many whole epochs as fit by the seconds "
        "of a step below, and its schedule has that length. Every composition is trained for the shortest time; for "
        f"each longer one {', '.join(BASELINES)} and of the others the half that did better on held-out images.",
        "",
        "*Planned*: by those seconds; *taken*: processor seconds of the training epochs themselves. *TFLOP*: counted "
        "operations of all updates. Accuracy in % of the last epoch, mean ± standard deviation over seeds where there "
        "are several; *held out*: PGD-10, by which the row is chosen; test images: the first "
        f"{_number([r['results']['clean'] for r in records if 'results' in r], 'n')}, which choose nothing. `{CHEAP}` "
        "leaves what AutoAttack leaves to a few tenths ([nearest.md](nearest.md)); AutoAttack itself has the baselines "
        "and what is chosen. A dash: not measured; without ±: one seed. Differences: points, mean ± standard error "
        "over the seeds that both rows have; **bold** where the 95 % interval of three seeds or more leaves out zero.",
        "",
        f"AutoAttack on test images; in parentheses `{CHEAP}` where AutoAttack was not made yet:",
        "",
        *summary(columns),
        "",
        "![Accuracy of each composition for each time](speedrun.png)",
        "",
        f"*What to see: a row for each composition, a panel for each time. Circle: held-out images; triangle: {CHEAP}, "
        "square: AutoAttack, on test images; bars: ± one standard error from the number of images alone. The grey band "
        "is the composition that held-out images choose; rows whose bars overlap with its own may be as good.*",
    ]
    for column in columns:
        lines += ["", f"## {column.budget:g} minutes", "", *table(column), "", remarks(column)]
    lines += [
        "",
        "## Seconds of a step",
        "",
        f"Measured {' and '.join(sorted({row['date'] for row in rows.values()}))} on one thread "
        f"({', '.join(sorted({row['device'] for row in rows.values()}))}), a few steps of each composition in turn, "
        "again and again, in processor seconds of the process; the median counts.",
        "",
        *calibration(rows),
    ]
    return "\n".join(lines) + "\n"


def write_page(target: Path) -> None:
    """speedrun.md and speedrun.png.

    Raises:
        InputError: where there are no lines.
    """
    from speedrun_cpu_figure import draw

    rows = read_calibration(target / CALIBRATION)
    columns = columns_of(list(read(target / "speedrun.jsonl").values()), list(rows))
    if not columns:
        raise InputError(f"{target / 'speedrun.jsonl'} has no lines; train first, without --page-only")
    (target / "speedrun.md").write_text(page(columns, rows), encoding="utf-8")
    draw(columns, target / "speedrun.png")
