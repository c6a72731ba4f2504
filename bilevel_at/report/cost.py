"""What training cost, and what its last epochs took away again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..figures import comparison
from ..runs.record import Run
from .groups import Group, all_runs, by_threat
from .numbers import Spread, gap, number, points, seconds, span
from .page import Cell, Figure, Part, Section, Table
from .ranking import table_columns

__all__ = ["cost", "device", "epoch_seconds", "robust_gap"]


def cost(groups: Sequence[Group], folder: Path) -> Section | None:
    """Best against last epoch, seconds per epoch, memory and parameters; bars where there are several groups."""
    timed = {group.label: per_epoch for group in groups if (per_epoch := _times(group))}
    if not timed and not any(run.metrics for run in all_runs(groups)):
        return None
    devices = {machine(run) for run in all_runs(groups)}
    alike = len(devices) == 1 and "device" in groups[0].runs[0].part("machine")  # so that times can be compared
    memory = any(number(line.get("memory")) > 0 for run in all_runs(groups) for line in run.metrics)
    threats = by_threat(groups)
    attack = _shared_attack(groups) if len(threats) == 1 else None
    ratio = alike and len(timed) > 1
    head = ["training", "epochs", *(["best − last epoch (points)"] if len(threats) == 1 else [])]
    head += ["time per epoch"] if timed else []
    head += [
        *([f"relative to {next(iter(timed))}"] if ratio else []),
        *(["GPU memory"] if memory else []),
        "parameters",
    ]
    first = fmean(next(iter(timed.values()))) if timed else math.nan
    rows = []
    for group in groups:
        done = [int(run.metrics[-1]["epoch"]) for run in group.runs if run.metrics]
        times = timed.get(group.label)
        cells = [Cell(group.label, aside=group.seeds()), Cell(span(done) or "–")]
        cells += [_gap_cell(group, attack)] if len(threats) == 1 else []
        if timed:
            aside = "" if len(devices) == 1 else ", ".join(dict.fromkeys(device(run) for run in group.runs))
            cells.append(Cell(seconds(fmean(times)) if times else "–", aside=aside))
        if ratio:
            cells.append(Cell(f"{fmean(times) / first:.2f} ×" if times and first else "–"))
        if memory:
            peak = max(
                (v for run in group.runs for m in run.metrics if (v := number(m.get("memory"))) > 0), default=0.0
            )
            cells.append(Cell(f"{peak:.2f} GiB" if peak > 0 else "–"))
        sizes = [n for run in group.runs if isinstance(n := run.config.get("parameters"), int)]
        cells.append(Cell(span(f"{n:,}" for n in sizes) or "–"))
        rows.append(cells)
    parts: list[Part] = _gaps(threats) if len(threats) > 1 else [_sentence(groups, attack)]
    parts.append(Table(head, rows, _caption(devices, all_runs(groups)) if timed else ""))
    if ratio:
        parts.append(_bars(timed, folder / "seconds.png"))
    return Section("Best against last epoch, and cost", parts)


def _gap_cell(group: Group, attack: str | None) -> Cell:
    lost = robust_gap(group, attack)
    return Cell(gap(lost[0]), aside=lost[1]) if lost else Cell("–")


def _gaps(threats: Sequence[tuple[str, Sequence[Group]]]) -> list[Part]:
    """Best against last epoch, a table for each threat: these are differences of accuracies."""
    parts: list[Part] = []
    for at, groups in threats:
        attack = _shared_attack(groups)
        rows = [[Cell(group.label, aside=group.seeds()), _gap_cell(group, attack)] for group in groups]
        text = f"Robust accuracy of the best epoch less that of the last, {at}. {_sentence(groups, attack)}"
        parts.append(Table(["training", "best − last epoch (points)"], rows, text))
    return parts


def _bars(timed: Mapping[str, Sequence[float]], path: Path) -> Figure:
    comparison.seconds(timed, path)
    means = {label: fmean(times) for label, times in timed.items()}
    slow, fast = max(means, key=lambda k: means[k]), min(means, key=lambda k: means[k])
    caption = (
        f"Training time per epoch: an epoch of {slow} takes {seconds(means[slow])}, "
        f"{means[slow] / max(means[fast], 1e-9):.1f} times one of {fast} ({seconds(means[fast])})."
    )
    dots = " A dot is a run's median, a bar their mean." if any(len(t) > 1 for t in timed.values()) else ""
    return Figure(path, caption + dots, "Training seconds per epoch")


def epoch_seconds(run: Run) -> float | None:
    """The median over epochs of the training seconds of one."""
    times = [t for line in run.metrics if not math.isnan(t := number(line.get("train_seconds")))]
    return median(times) if times else None


def device(run: Run) -> str:
    """The device a run was trained on, by name."""
    return str(run.part("machine").get("device", "a device that is not on record"))


def machine(run: Run) -> tuple[Any, ...]:
    """The recorded device, platform and threads. Times of runs are comparable if these are equal."""
    own = run.part("machine")
    return device(run), own.get("platform"), own.get("threads")


def robust_gap(group: Group, attack: str | None) -> tuple[Spread, str] | None:
    """Robust overfitting: the difference in robust accuracy between the best and the last epoch.

    It is measured on the test set if both epochs were evaluated under the attack. Otherwise it is measured on the
    held-out images, where it cannot be negative, because they determine the best epoch.

    Args:
        group: the runs.
        attack: the attack on the test set.

    Returns:
        The difference over seeds and the name of the attack; None if there are no metrics.
    """
    if attack is not None:
        pairs = [(run.under_threat("best").get(attack), run.under_threat("last").get(attack)) for run in group.runs]
        differences = [b["accuracy"] - last["accuracy"] for b, last in pairs if b is not None and last is not None]
        if differences:
            return Spread(tuple(differences)), attack
    drops = []
    for run in group.runs:
        values = [v for line in run.metrics if not math.isnan(v := number(line.get("robust")))]
        if values and len(values) == len(run.metrics):
            drops.append(max(values) - values[-1])
    names = {str(line.get("attack")) for run in group.runs for line in run.metrics if line.get("attack")}
    return (Spread(tuple(drops)), f"{span(names)}, held-out") if drops else None


def attacked(group: Group) -> bool:
    """Whether training used an attack; without one, robust overfitting is not defined."""
    sizes = [number(line.get("perturbation")) for run in group.runs for line in run.metrics]
    return not sizes or any(size > 0 or math.isnan(size) for size in sizes)


def _shared_attack(groups: Sequence[Group]) -> str | None:
    """The strongest attack under which most groups have both their best and their last epoch."""
    counts = {
        name: sum(g.accuracy("best", name) is not None and g.accuracy("last", name) is not None for g in groups)
        for name in table_columns(groups)
        if name != "clean"
    }
    return max(reversed(counts), key=lambda name: counts[name], default=None) if any(counts.values()) else None


def _times(group: Group) -> list[float]:
    return [time for run in group.runs if (time := epoch_seconds(run)) is not None]


def _sentence(groups: Sequence[Group], attack: str | None) -> str:
    gaps = {group.label: drop for group in groups if attacked(group) and (drop := robust_gap(group, attack))}
    if not gaps:
        return "There are no two epochs of adversarial training to compare."
    label, (spread, name) = max(gaps.items(), key=lambda item: item[1][0].mean)
    if spread.mean <= 0:
        return f"Robust overfitting: none. In no training is the last epoch less robust than the best one ({name})."
    whose = f"most in {label}" if len(gaps) > 1 else f"in {label}"
    return (
        f"Robust overfitting: between its best and its last epoch robust accuracy falls {whose}, by "
        f"{gap(spread).lstrip('+')} points ({name})."
        + (f" A gap of {points(spread.mean)} is within its own spread." if (spread.std or 0) > spread.mean else "")
        + (" One seed says little of so small a gap." if spread.std is None and spread.mean < 0.02 else "")
    )


def _caption(devices: set[tuple[Any, ...]], runs: Sequence[Run]) -> str:
    where = (
        f"on one kind of machine ({device(runs[0])})"
        if len(devices) == 1
        else "on different machines, so no ratio is formed"
    )
    return f"Time is the median over epochs of what training took, without evaluation, as recorded {where}."
