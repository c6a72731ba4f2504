"""Commands that reproduce the results of the page, all from one directory."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..runs.problem_file import packaged_problems
from ..runs.record import Run
from .groups import Group, all_runs
from .page import Cell, Code, Part, Section, Table

__all__ = ["commands", "repeat"]

RESUMING = ("yes", "no", "auto")


def repeat(groups: Sequence[Group], folder: Path) -> Section | None:
    """The commands; then the files they read, by their hashes, and the versions and machines."""
    runs = all_runs(groups)
    packaged = _packaged()
    lines, needed = commands(runs, packaged)
    where = "In an empty directory" if not needed else f"In a directory with {', '.join(needed)}"
    parts: list[Part] = [f"{where}, with the versions below:", Code("\n".join(lines))]
    several = len(runs) > 1
    if read := [row for key in ("file", "data") for row in _table(runs, key, f"{key}_sha256", packaged)]:
        parts.append(
            Table(["read from", "SHA-256", *(["runs"] * several)], [row[: 2 + several] for row in read], words=2)
        )
    if made := _made_with(runs):
        parts.append(Table(["made with", "", *(["runs"] * several)], [row[: 2 + several] for row in made], words=2))
    return Section("How to repeat", parts)


def _packaged() -> dict[str, str]:
    """SHA-256 -> name of the problem files of this package."""
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path.stem for path, _ in packaged_problems()}


def commands(runs: Sequence[Run], packaged: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The lines for a shell, and the files that are to be in its directory before.

    Commands were given in directories of their own, and a run's name there may have been taken; so here each run has
    a name of its own in ``runs/``, which its training, its evaluations and the report use.

    Args:
        runs: the runs of the page.
        packaged: SHA-256 -> name of the problem files that need not be there.
    """
    folders = _folders(runs)
    trainings: list[str] = []
    lines: list[str] = []  # evaluations, which may attack with the network of another run
    needed: dict[str, None] = {}
    for run in runs:
        own = Path(str(run.config.get("file") or ""))
        name = packaged.get(str(run.config.get("file_sha256")), own.name)
        moved = {str(own): name, own.name: name}
        if trained := _words(run.config.get("command")):
            rest = _without(trained[2:], ("--out", "--resume", "--logger"))
            trainings.append(_shell([trained[0], name or trained[1], *rest, "--out", folders[run.path]]))
            needed |= {} if name in packaged.values() else {name or trained[1]: None}
        for given in run.commands:
            words = [moved.get(word, word) for word in given]
            if "checkpoint" not in run.config and len(words) > 1:
                lines.append(_shell([words[0], folders[run.path], *_elsewhere(words[2:], runs, folders)]))
            else:  # weights from elsewhere
                lines.append(_shell([*words[:2], *_without(words[2:], ("--out",)), "--out", folders[run.path]]))
                needed |= dict.fromkeys(words[1:2])
        data, folder = (str(run.part("options").get(key) or "") for key in ("data", "data_dir"))
        if data.endswith(".npz"):
            needed[data] = None
        elif data not in ("", "digits"):
            needed[f"{data} in {folder or 'data'}/"] = None
    files = [word for run in runs for word in run.problem_files]
    options = ["--problem-file", *dict.fromkeys(Path(word).name for word in files)] if files else []
    report = ["bilevel_at.report", *folders.values(), *options]
    return [*dict.fromkeys([*trainings, *lines]), _shell(report)], list(needed)


def _folders(runs: Sequence[Run]) -> Mapping[Path, str]:
    """A directory for each run, in ``runs/``, by the run's own name."""
    folders: dict[Path, str] = {}
    for run in runs:
        name = folder = f"runs/{run.path.resolve().name}"
        count = 1
        while folder in folders.values():
            count += 1
            folder = f"{name}-{count}"
        folders[run.path] = folder
    return folders


def _words(command: object) -> list[str]:
    """A recorded argument list; empty if there is none."""
    if not isinstance(command, list) or len(command) < 2 or not all(isinstance(word, str) for word in command):
        return []
    return command[2:] if command[:2] == ["python", "-m"] else command


def _without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The arguments without these flags and their values."""
    kept: list[str] = []
    place = 0
    while place < len(words):
        flag, equals, _ = words[place].partition("=")
        place += 1
        if flag not in names:
            kept.append(words[place - 1])
        elif flag == "--logger":  # of several values
            while place < len(words) and not words[place].startswith("--"):
                place += 1
        elif not equals and place < len(words) and (flag != "--resume" or words[place] in RESUMING):
            place += 1
    return kept


def _elsewhere(words: Sequence[str], runs: Sequence[Run], folders: Mapping[Path, str]) -> list[str]:
    """The arguments, in which surrogates that are runs of the page have the names they have here."""
    names = {str(run.path): folders[run.path] for run in runs}

    def moved(word: str) -> str:
        if not word.startswith("transfer:"):
            return word
        source = word.removeprefix("transfer:")
        path, colon, attack = source.rpartition(":")
        if source in names:
            return f"transfer:{names[source]}"
        return f"transfer:{names[path]}:{attack}" if colon and path in names else word

    return [moved(word) for word in words]


def _shell(words: Sequence[str]) -> str:
    return shlex.join(["python", "-m", *words])


def _table(runs: Sequence[Run], name: str, key: str, packaged: Mapping[str, str]) -> list[list[Cell]]:
    counts: dict[tuple[str, str], int] = {}
    for run in runs:
        if isinstance(run.config.get(key), str):
            what = packaged.get(run.config[key]) or str(run.config.get(name) or run.part("options").get(name, ""))
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
