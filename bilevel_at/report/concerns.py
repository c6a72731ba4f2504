"""Warnings about the results: findings of the checks, catastrophic overfitting, and missing evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runs.record import Run
from .groups import Group, all_runs, by_threat
from .numbers import number
from .page import Code, Details, Notes, Part, Section
from .ranking import comparable

__all__ = ["concerns"]


def concerns(groups: Sequence[Group], folder: Path) -> Section | None:
    """Warnings of ``checks.json``, catastrophic overfitting, reasons why rows are not comparable; then missing work."""
    runs = all_runs(groups)
    names = {run.path: (run.name if len(runs) > 1 else "") for run in runs}
    grave = [note for run in runs for note in _warnings(run, names[run.path])]
    grave += [(_who(names[run.path]), f"{run.collapse}.") for run in runs if run.collapse]
    grave += [(_who(), note) for note in _incomparable(groups)]
    mild = [note for run in runs for note in _missing(run, names[run.path])]
    unchecked = [run for run in runs if run.results and not any(map(_measures, run.checks.values()))]
    if unchecked:
        which = "" if len(unchecked) == len(runs) else f" of {', '.join(run.name for run in unchecked)}"
        mild.append(
            ("Not checked.", f"No checks for gradient masking are on record{which}; bilevel_at.evaluate makes them.")
        )
    parts: list[Part] = [Notes(grave, grave=True)] if grave else []
    checked = [(run, which) for run in runs for which in run.checks if _measures(run.checks[which])]
    no_attack = [f"{names[run.path]} {which}".strip() for run, which in checked if not _attacks(run.checks[which])]
    if no_attack:
        sentence = f"The checks of {', '.join(no_attack)} had no radius to attack in; only gradients were looked at."
        mild.append(("Half checked.", sentence))
    if checked and not any(_warnings(run, "") for run in runs):
        of = ", ".join(dict.fromkeys(which.replace("_", " ") for _, which in checked))
        parts.append(
            f"The checks on {len(checked)} checkpoint{'s' * (len(checked) > 1)} ({of}) found nothing to warn of."
        )
    if mild:
        parts.append(Notes(mild))
    if measured := [(run, which, values) for run, which in checked if (values := run.checks[which].get("measured"))]:
        lines = "\n".join(_measured(names[run.path], which, values) for run, which, values in measured)
        parts.append(Details("What the checks measured", [Code(lines)]))
    return (
        Section("Warnings" if grave else "Warnings: none" if not mild else "Before you read on", parts)
        if parts
        else None
    )


def _measures(section: Mapping[str, Any]) -> bool:
    """Whether the record contains measurements of the network, besides comparisons of attacks."""
    network = section.get("network", section.get("measured"))
    return isinstance(network, dict) and bool(network)


def _attacks(section: Mapping[str, Any]) -> bool:
    network = section.get("network")
    return not isinstance(network, dict) or "pgd" in network


def _who(name: str = "", which: str = "") -> str:
    heading = ", ".join(part for part in (name, f"{which.replace('_', ' ')} checkpoint" if which else "") if part)
    return f"{heading[:1].upper() * (not name) or heading[:1]}{heading[1:]}:" if heading else ""


def _warnings(run: Run, name: str) -> list[tuple[str, str]]:
    notes = []
    for which, section in run.checks.items():
        warnings = section.get("warnings")
        for warning in warnings if isinstance(warnings, list) else []:
            if isinstance(warning, dict) and warning.get("message"):
                notes.append((_who(name, which), str(warning["message"])))
    return notes


def _incomparable(groups: Sequence[Group]) -> list[str]:
    if len(groups) < 2 or comparable(groups):
        return []
    runs = all_runs(groups)
    reasons = []
    threats = [rivals[0].threat for _, rivals in by_threat(groups)]
    if len(threats) > 1:
        names = "; ".join(sorted(map(str, threats)))
        reasons.append(f"the networks are to withstand different threats ({names}), each with a table of its own")
    entries = [e for run in runs for which in run.results for e in run.under_threat(which).values()]
    if len({(e.get("data"), e.get("n")) for e in entries}) > 1:
        reasons.append("they were evaluated on different images")
    return [f"Trainings are not to be ranked against each other: {', and '.join(reasons)}."] if reasons else []


def _missing(run: Run, name: str) -> list[tuple[str, str]]:
    sentences = []
    planned, done = number(run.part("options").get("epochs")), len(run.metrics)
    if done and done < planned:
        sentences.append(f"{done} of {planned:.0f} epochs are done; the numbers are of an unfinished run.")
    if not run.results:
        sentences.append("no evaluation is on record; bilevel_at.evaluate makes one.")
    return [(_who(name), sentence) for sentence in sentences]


def _measured(name: str, which: str, values: Any, most: int = 200) -> str:
    begin = " ".join(part for part in (name, which.replace("_", " ")) if part)
    if not isinstance(values, Mapping):
        return f"{begin}: {str(values)[:most]}"
    width = max((len(str(key)) for key in values), default=0)
    return "\n".join([begin, *(f"  {str(key):<{width}}  {_value(value)[:most]}" for key, value in values.items())])


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_value(v)}" for k, v in value.items())
    return str(value)
