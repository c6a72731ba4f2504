"""Commands that reproduce the results of the page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..runs.record import Run
from .groups import Group, all_runs
from .page import Cell, Code, Part, Section, Table

__all__ = ["repeat"]


def repeat(groups: Sequence[Group], folder: Path) -> Section | None:
    """The commands; then the files they read, by their hashes, and the versions and machines."""
    runs = all_runs(groups)
    commands = [_shell(command) for run in runs for command in (run.config.get("command"), *run.commands) if command]
    report = shlex.join(["python", "-m", "bilevel_at.report", *(str(run.path) for run in runs)])
    parts: list[Part] = []
    if commands:
        parts.append("Where the problem files are, with the versions below; then this page:")
    parts.append(Code("\n".join([*dict.fromkeys(filter(None, commands)), report])))
    several = len(runs) > 1
    if read := [*_table(runs, "file", "file_sha256"), *_table(runs, "data", "data_sha256")]:
        parts.append(
            Table(["read from", "SHA-256", *(["runs"] * several)], [row[: 2 + several] for row in read], words=2)
        )
    if made := _made_with(runs):
        parts.append(Table(["made with", "", *(["runs"] * several)], [row[: 2 + several] for row in made], words=2))
    return Section("How to repeat", parts)


def _shell(command: object) -> str | None:
    """A recorded argument list as a line for the shell."""
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        return None
    return shlex.join(command if command[0].startswith("python") else ["python", "-m", *command])


def _table(runs: Sequence[Run], name: str, key: str) -> list[list[Cell]]:
    counts: dict[tuple[str, str], int] = {}
    for run in runs:
        if isinstance(run.config.get(key), str):
            what = str(run.config.get(name) or run.part("options").get(name, ""))
            counts[what, run.config[key]] = counts.get((what, run.config[key]), 0) + 1
    return [[Cell(what), Cell(digest, code=True), Cell(str(count))] for (what, digest), count in counts.items()]


def _made_with(runs: Sequence[Run]) -> list[list[Cell]]:
    """Versions and machines, with the number of runs of each."""
    counts: dict[str, dict[str, int]] = {}
    for run in runs:
        for name, value in {**run.part("versions"), **run.part("machine")}.items():
            runs_by_value = counts.setdefault(name, {})
            runs_by_value[str(value)] = runs_by_value.get(str(value), 0) + 1
    return [
        [Cell(name), Cell(value), Cell(str(count))]
        for name, runs_by_value in counts.items()
        for value, count in runs_by_value.items()
    ]
