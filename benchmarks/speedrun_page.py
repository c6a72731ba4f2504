"""The page of ``speedrun.py``, from its files of results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CHEAP", "PAGE", "STRONG", "by_composition", "mean", "page", "read"]

CHEAP, STRONG = "nearest-40-3-2", "autoattack"
PAGE = "speedrun-gpu.md"  # speedrun.md is that of speedrun_cpu.py
Record = dict[str, Any]


def read(folder: Path) -> list[Record]:
    """The records of all commands that wrote into the folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("speedrun-*.json"))]


def by_composition(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """(name, a record for each seed) of each composition, of those in which no seed failed or is missing.

    Records of one name that were trained with other settings (precision, epochs, …) are a group of their own.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((record.get("composition", ""), *_settings(record.get("job", ()))), []).append(record)
    return [(key[0], group) for key, group in groups.items() if key[0] and not any("failed" in r for r in group)]


def _settings(job: Sequence[str]) -> list[str]:
    """The command without what differs between the seeds of a composition, and without where files are."""
    without = {i + k for i, word in enumerate(job) for k in (0, 1) if word in ("--seed", "--out", "--data-dir")}
    return [word for i, word in enumerate(job) if i not in without]


def values(records: Sequence[Record], what: str) -> list[float]:
    """``seconds``, ``operations``, … or the accuracy under an attack of each record that has it."""
    if what in ("clean", CHEAP, STRONG):
        return [r["results"][what]["accuracy"] for r in records if what in r.get("results", {})]
    return [r[what] for r in records if r.get(what) is not None]


def mean(records: Sequence[Record], what: str) -> float:
    """Over all records; NaN where one has no such value, which no comparison takes for reached."""
    numbers = values(records, what)
    return statistics.mean(numbers) if numbers and len(numbers) == len(records) else float("nan")


def cell(records: Sequence[Record], what: str, scale: float = 1.0, style: str = ".1f") -> str:
    """Mean ± standard deviation over seeds, or a dash."""
    numbers = [scale * value for value in values(records, what)]
    if not numbers or len(numbers) < len(records):
        return "–"
    spread = f" ± {statistics.stdev(numbers):{style}}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):{style}}{spread}"


def page(records: Sequence[Record], targets: Sequence[float]) -> str:
    """All records, one part for each device and network, in markdown."""
    lines = [
        "# The shortest training to an accuracy under AutoAttack",
        "",
        "`python benchmarks/speedrun.py --data-dir D --write docs/results`: CIFAR-10, ε = 8/255 in ℓ∞, no other data. "
        "Seconds are those of the training epochs on one device: augmentation, attacks, updates, and compiling where "
        "steps are compiled; not loading the data, choosing the memory format or looking at held-out images. PFLOP are "
        "the updates' convolutions and matrix products. Accuracy in % of the last epoch on the test images; mean ± "
        f"standard deviation over seeds. AutoAttack goes to what {CHEAP} leaves near a target, fastest first, until "
        "one reaches it: a dash is an attack that was not made. The fastest composition is chosen on the images that "
        "it is measured on.",
    ]
    parts: dict[tuple[str, str, bool], list[Record]] = {}
    for record in records:
        parts.setdefault((record["device"], record["model"], record["proof"]), []).append(record)
    for (device, model, proof), of_part in sorted(parts.items()):
        lines += ["", f"## {device}, {model}"]
        if proof:
            lines += ["", "**A proof that the script works, on a CPU or at reduced size; no figure here is a result.**"]
        lines += ["", *_targets(of_part, targets), "", *_rows(of_part)]
    return "\n".join(lines) + "\n"


def _targets(records: Sequence[Record], targets: Sequence[float]) -> list[str]:
    """The fastest composition that reaches each target."""
    lines = ["| target | fastest of those below | seconds | PFLOP | AutoAttack | seeds |", "|---|---|---|---|---|---|"]
    groups = sorted(by_composition(records), key=lambda group: mean(group[1], "seconds"))
    for target in sorted(targets):
        reached = [(name, group) for name, group in groups if 100 * mean(group, STRONG) >= target]
        if not reached:
            lines.append(f"| {target:g} % | none | – | – | – | – |")
            continue
        name, group = reached[0]
        lines.append(
            f"| {target:g} % | {name} | {cell(group, 'seconds')} | {cell(group, 'operations', 1e-15, '.3g')} | "
            f"{cell(group, STRONG, 100, '.2f')}{_images(group)} | {len(group)} |"
        )
    return lines


def _rows(records: Sequence[Record]) -> list[str]:
    """Every composition, the fastest first, and those that failed."""
    lines = [
        f"| composition | seconds | of these starting | PFLOP | clean | {CHEAP} | AutoAttack | seeds | how |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = by_composition(records)
    for name, group in sorted(groups, key=lambda group: mean(group[1], "seconds")):
        numbers = [
            cell(group, "seconds"),
            cell(group, "start_seconds"),
            cell(group, "operations", 1e-15, ".3g"),
            *(cell(group, attack, 100, ".2f") for attack in ("clean", CHEAP, STRONG)),
        ]
        lines.append(f"| {name}: `{group[0]['text']}` | {' | '.join(numbers)} | {len(group)} | {_how(group)} |")
    for record in records:
        if "failed" in record:
            reason = record["failed"].splitlines()[0].replace("|", "/")
            lines.append(
                f"| {record['composition']}: `{record['text']}` | failed: {reason} | – | – | – | – | – | seed "
                f"{record['seed']} | – |"
            )
    starts = (
        "Starting (and compiling): what the epochs took above their number times the median one. A run that was "
        "trained in several pieces starts in each; what it lost of an epoch that was cut off is not counted."
    )
    return [*lines, "", starts]


def _how(records: Sequence[Record]) -> str:
    """Precision, compiled or not, memory format, and in how many processes, torch and the day."""
    first: Mapping[str, Any] = records[0]
    pieces = max(record["pieces"] for record in records)
    parts = [
        f"{len(first['epoch_seconds'])} epochs",
        first["precision"],
        "compiled" if first["compiled"] else "not compiled",
        first["memory_format"],
    ]
    parts += [f"in {pieces} pieces"] if pieces > 1 else []
    return ", ".join([*parts, f"torch {first['versions']['torch']}", first["date"]]) + _images(records)


def _images(records: Sequence[Record]) -> str:
    """The number of test images, where it is not CIFAR-10's."""
    n = records[0]["results"]["clean"]["n"]
    return "" if n == 10_000 else f" (n = {n})"
