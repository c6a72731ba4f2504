"""Warnings about the results: findings of the checks, catastrophic overfitting, and missing evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    grave = [note for group in groups for note in _together(group, names, _warnings)]
    grave += [note for group in groups for note in _together(group, names, _collapse)]
    grave += [(_who(), note) for note in _incomparable(groups)]
    mild = [note for group in groups for note in _together(group, names, _missing)]
    unchecked = [run for run in runs if run.results and not any(map(_measures, run.checks.values()))]
    if unchecked:
        which = "" if len(unchecked) == len(runs) else f" of {_listed(groups, unchecked)}"
        mild.append(
            ("Not checked.", f"No checks for gradient masking are on record{which}; bilevel_at.evaluate makes them.")
        )
    parts: list[Part] = [Notes(grave, grave=True)] if grave else []
    checked = [(run, which) for run in runs for which in run.checks if _measures(run.checks[which])]
    no_attack = [f"{names[run.path]} {which}".strip() for run, which in checked if not _attacks(run.checks[which])]
    if no_attack:
        sentence = f"The checks of {', '.join(no_attack)} had no radius to attack in; only gradients were looked at."
        mild.append(("Half checked.", sentence))
    if checked and not any(_warnings(run) for run in runs):
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


class _Note(NamedTuple):
    """What is to be said of a run: alike notes of several seeds have the same checkpoint and kind."""

    which: str
    kind: str
    message: str


def _together(
    group: Group, names: Mapping[Path, str], of_run: Callable[[Run], Sequence[_Note]]
) -> list[tuple[str, str]]:
    """The notes of a group's runs; one for all seeds to which the same happened, in the words of the first."""
    alike: dict[tuple[str, str], list[tuple[Run, str]]] = {}
    for run in group.runs:
        for note in of_run(run):
            alike.setdefault((note.which, note.kind), []).append((run, note.message))
    notes = []
    for (which, _), said in alike.items():
        run, message = said[0]
        if len(group.runs) == 1:
            notes.append((_who(names[run.path], which), message))
            continue
        of = _seeds([run for run, _ in said])
        whom = f"{group.label}, {of} ({len(said)} of {len(group.runs)} runs)"
        first = f" (In the words of {_seeds([run])}.)" if len({words for _, words in said}) > 1 else ""
        notes.append((_who(whom, which), message + first))
    return notes


def _seeds(runs: Sequence[Run]) -> str:
    seeds = [str(run.part("options").get("seed", run.name)) for run in runs]
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def _listed(groups: Sequence[Group], chosen: Sequence[Run]) -> str:
    """The runs by their groups: all seeds of a training are that training."""
    parts = []
    for group in groups:
        own = [run for run in group.runs if run in chosen]
        if own and len(group.runs) == 1:
            parts.append(own[0].name)
        elif own:
            parts.append(group.label + (f", {_seeds(own)}" if len(own) < len(group.runs) else ""))
    return "; ".join(parts)


def _warnings(run: Run) -> list[_Note]:
    notes = []
    for which, section in run.checks.items():
        warnings = section.get("warnings")
        for warning in warnings if isinstance(warnings, list) else []:
            if isinstance(warning, dict) and warning.get("message"):
                message = str(warning["message"])
                notes.append(_Note(which, str(warning.get("name") or message), message))
    return notes


def _collapse(run: Run) -> list[_Note]:
    return [_Note("", "collapse", f"{run.collapse}.")] if run.collapse else []


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


def _missing(run: Run) -> list[_Note]:
    notes = []
    planned, done = number(run.part("options").get("epochs")), len(run.metrics)
    if done and done < planned:
        sentence = f"{done} of {planned:.0f} epochs are done; the numbers are of an unfinished run."
        notes.append(_Note("", "unfinished", sentence))
    if not run.results:
        notes.append(_Note("", "results", "no evaluation is on record; bilevel_at.evaluate makes one."))
    return notes


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
