"""The page of ``overfitting.py``, from its lines of JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overfitting_runs import BATCH, COMPOSITIONS, RATE, WIDTH
from overfitting_verdict import Candidate, candidates_of, definitions, rows, verdict
from overfitting_warnings import onset, pairs_of

__all__ = ["write_page"]

LEAST = 10  # collapses, below which the page says that there are too few
Record = Mapping[str, Any]
Records = Sequence[Record]


def of(records: Records, method: str, epsilon: float) -> list[Record]:
    cell = [r for r in records if (r["settings"]["method"], r["settings"]["epsilon"]) == (method, epsilon)]
    return sorted(cell, key=lambda r: r["settings"]["seed"])


def methods_of(records: Records) -> list[str]:
    present = {r["settings"]["method"] for r in records}
    return [method for method in COMPOSITIONS if method in present]


def epsilons_of(records: Records) -> list[float]:
    return sorted({r["settings"]["epsilon"] for r in records})


def grid(records: Records, cell: Any) -> list[str]:
    """A table of compositions by ε."""
    epsilons = epsilons_of(records)
    lines = ["| composition | " + " | ".join(f"{e:g}/255" for e in epsilons) + " |", "|---" * (1 + len(epsilons)) + "|"]
    for method in methods_of(records):
        cells = [cell(runs) if (runs := of(records, method, e)) else "–" for e in epsilons]
        lines.append(f"| {COMPOSITIONS[method].title} | " + " | ".join(cells) + " |")
    return lines


def when(runs: Records) -> str:
    """How many collapse, and in which epochs."""
    first = [epoch for run in runs if (epoch := onset(run)) is not None]
    failed = sum("failed" in run for run in runs)
    text = f"{len(first)} of {len(runs)}"
    text += f" (epoch {', '.join(map(str, sorted(first)))})" if first else ""
    return f"**{text}**" * bool(first) + text * (not first) + (f"; {failed} diverged" if failed else "")


def spread(values: Sequence[float]) -> str:
    error = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{error}"


def accuracies(runs: Records) -> str:
    """PGD-10 of the best and of the last epoch; clean of the last."""
    runs = [run for run in runs if run["epochs"]]
    if not runs:
        return "diverged"
    best = [max(line["robust"] for line in run["epochs"]) for run in runs]
    last, clean = ([run["epochs"][-1][name] for run in runs] for name in ("robust", "clean"))
    return f"{spread(best)} → {spread(last)}; {spread(clean)}"


def where_it_sets_in(records: Records) -> str:
    """For each composition the smallest ε at which most of its seeds collapse."""
    from_where, never = [], []
    for method in methods_of(records):
        title, cells = COMPOSITIONS[method].title, {e: of(records, method, e) for e in epsilons_of(records)}
        counts = {e: sum(onset(run) is not None for run in runs) for e, runs in cells.items()}
        most = [e for e, count in counts.items() if 2 * count > len(cells[e])]
        if most:
            from_where.append(f"{title} {most[0]:g}/255")
        elif not sum(counts.values()):
            never.append(title)
    text = "The smallest ε at which most seeds collapse: " + ("; ".join(from_where) or "none, in any composition") + "."
    text += f" In no run: {', '.join(never)}." if never else ""
    low = sum(max((line["robust"] for line in r["epochs"]), default=0) < 0.05 for r in records)
    if low:
        text += f" Never above 5 %, and so without a collapse by definition: {low} of {len(records)} runs."
    return text


def too_few(records: Records) -> str:
    """Why nothing can be said about warnings; empty where there are collapses enough."""
    runs = [r for r in records if onset(r) is not None]
    if not runs:
        return "No run collapses, so that nothing can be said about warnings."
    if len(runs) < LEAST:
        few = f"Only {len(runs)} of {len(records)} runs collapse"
        return f"{few}, too few to say what warns; at least {LEAST} are needed."
    if len({r["settings"]["seed"] for r in runs}) < 2:
        return "All collapses are of one seed, so that no threshold can be tested on another."
    return ""


def few_compositions(records: Records) -> str:
    """Whose collapses they are, where they are of one or two compositions."""
    collapsing = {r["settings"]["method"] for r in records if onset(r) is not None}
    if len(collapsing) > 2:
        return ""
    names = " and ".join(COMPOSITIONS[name].title for name in COMPOSITIONS if name in collapsing)
    return f"All collapses are of {names}: what warns of them need not warn of others."


def answer(records: Records, candidates: Sequence[Candidate]) -> list[str]:
    """What can be said about warnings, the table and what its columns are."""
    doubt = too_few(records)
    lines = [f"**{doubt}**"] if doubt else verdict(candidates)
    if not doubt and (narrow := few_compositions(records)):
        lines = [f"**{narrow}**", "", *lines]
    return [*lines, "", *rows(candidates), "", *definitions(pairs_of(records))] if candidates else lines


def numbered(seeds: Sequence[int]) -> str:
    return f"seeds {seeds[0]}–{seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"


def machines(records: Records) -> str:
    """When, on what and with what."""
    dates = sorted({r["date"] for r in records})
    others = {(r["device"], f"torch {r['versions']['torch']}, Python {r['versions']['python']}") for r in records}
    what = "; ".join(f"{device}, 1 thread a run, {versions}" for device, versions in sorted(others))
    return f"{dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}, {what}"


def page(records: Records, candidates: Sequence[Candidate], command: str, caption: str) -> str:
    first = records[0]["settings"]
    seeds = sorted({r["settings"]["seed"] for r in records})
    compositions = "; ".join(f"{COMPOSITIONS[m].title}: `{COMPOSITIONS[m].words}`" for m in methods_of(records))
    lines = [
        "# Catastrophic overfitting on CIFAR-10",
        "",
        f"`{command}`; {machines(records)}.",
        "",
        f"At what ε, and for which composition, does it set in, and does anything warn an epoch ahead? {len(records)} "
        f"runs, {numbered(seeds)}: {first['examples']:,} training images, a tenth of them held out; a "
        f"pre-activation residual network of three blocks (width {WIDTH}); {first['epochs']} epochs of batch {BATCH}, "
        f"SGD 0.9 with the rate going 0 → {RATE} → 0, no augmentation. Each composition is "
        "[`problems/composed.py`](../../problems/composed.py) with `--mode train` and "
        f"{compositions}. Nothing is chosen on test images; none are looked at.",
        "",
        "![Held-out accuracy by epoch, and what warns best](overfitting.png)",
        "",
        f"*{caption}*",
        "",
        "## Where it sets in",
        "",
        where_it_sets_in(records),
        "",
        *grid(records, when),
        "",
        "How many of the seeds collapse, and the first epoch of each collapse. A run has collapsed where "
        "`bilevel_at.train.catastrophic_overfitting` says so: held-out PGD-10 accuracy below half of its best so far "
        "and by at least 5 points, while accuracy on the attacked training images has risen.",
        "",
        *grid(records, accuracies),
        "",
        "Held-out accuracy in %, mean ± standard deviation over seeds: PGD-10 of the best epoch → of the last; clean, "
        "last.",
        "",
        "## Does it warn?",
        "",
        *answer(records, candidates),
    ]
    return "\n".join(lines).rstrip() + "\n"


def write_page(records: Records, target: Path, command: str) -> None:
    """overfitting.md and overfitting.png, from the lines alone."""
    from overfitting_figure import draw

    candidates = candidates_of(records)
    best = next((w for w in candidates if w.predictor.measured), None)
    target.mkdir(parents=True, exist_ok=True)
    caption = draw(records, None if best is None else (best.predictor, best.cases), target / "overfitting.png")
    (target / "overfitting.md").write_text(page(records, candidates, command, caption), encoding="utf-8")
