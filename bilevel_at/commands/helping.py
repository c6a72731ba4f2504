"""What ``--help`` says besides the flags: groups, an example, and the defaults on each data set."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from ..data import DATA_NAMES
from ..errors import InputError
from ..evaluate.radius import radius_text
from ..runs.problem_file import ProblemFile
from ..solver import Solver

__all__ = ["run_epilogue", "run_groups", "shown_value", "table"]


def run_groups(file: str, data: str) -> dict[str, str]:
    """The groups of ``run FILE --help`` in order, and a line on each."""
    return {
        "problem": f"The arguments of problem(...) in {file}, with their defaults on {data}. Inputs are in [0, 1], and "
        "ε and steps are in their units: 0.03 and 8/255 are numbers.",
        "solver": "How the players are coupled. --solver NAME --help lists the flags of another solver.",
        "training": f"The recipe; its defaults on {data} are the method's published ones where there are some.",
        "data": "What is trained on, and evaluated on.",
        "output": "What is computed at the end, and where everything goes.",
    }


def run_epilogue(file: ProblemFile, named: str) -> str:
    """The defaults that differ between data sets, and an example.

    Args:
        file: the problem file.
        named: how the user has named it.
    """
    takes = inspect.signature(file.problem).parameters
    epsilon = " --epsilon 8/255" if "epsilon" in takes else ""
    lines = ["example:", f"  python -m bilevel_at.run {named} --data cifar10{epsilon} --epochs 30 --out runs/mine"]
    if differing := table(file):
        lines = ["defaults on each data set (--data), where they differ:", *differing, "", *lines]
    return "\n".join(lines)


def table(file: ProblemFile) -> list[str]:
    """The settings that differ between data sets, a line each, with a column for each group of alike data sets."""
    columns: dict[str, Mapping[str, Any]] = {}
    for data in DATA_NAMES:
        try:
            columns[data] = _settings(file, data)
        except InputError:  # a recipe that cannot be read is told of where it is used
            continue
    names = list(dict.fromkeys(name for settings in columns.values() for name in settings))
    differ = [name for name in names if len({_text(name, settings) for settings in columns.values()}) > 1]
    alike: dict[tuple[str, ...], list[str]] = {}
    for data, settings in columns.items():
        alike.setdefault(tuple(_text(name, settings) for name in differ), []).append(data)
    if len(alike) < 2:
        return []
    rows = [["", *(_heading(group) for group in alike.values())]]
    rows += [["--" + name.replace("_", "-"), *(cells[i] for cells in alike)] for i, name in enumerate(differ)]
    lines = _aligned(rows)
    also = [group for group in alike.values() if len(group) > 1]
    return lines + [f"  {group[0]} …: {', '.join(group)}" for group in also]


def _heading(group: list[str]) -> str:
    return group[0] + (" …" if len(group) > 1 else "")


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join(row).rstrip() for row in padded]


def _settings(file: ProblemFile, data: str) -> Mapping[str, Any]:
    """The fields of the recipe, and the arguments of ``problem(...)``."""
    recipe = file.recipe(data)
    names = [field.name for field in dataclasses.fields(recipe) if field.name not in ("problem", "modern")]
    fields = {name: getattr(recipe, name) for name in names}
    if file.model is not None:
        fields["model"] = "file"
    parameters = inspect.signature(file.problem).parameters
    of_problem = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {**of_problem, **recipe.problem, **fields}


def _text(name: str, settings: Mapping[str, Any]) -> str:
    return shown_value(settings.get(name))


def shown_value(value: Any) -> str:
    """A setting as the help shows it: fractions of 255 as they are usually written."""
    if isinstance(value, float):
        return radius_text(value)
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, Solver):
        return type(value).__name__
    return "none" if value is None else str(value)
