"""A page for each problem file: from the file itself, its row of the digits' results, its line of methods.md."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from docstrings import prose

from bilevel_at.commands.flags import Flag, flags_of
from bilevel_at.diagnose import describe
from bilevel_at.evaluate.radius import radius_text
from bilevel_at.runs.problem_file import packaged_problems
from bilevel_at.runs.recipe import Recipe
from bilevel_at.solvers import ZeroIG

ROOT = Path(__file__).resolve().parents[2]
WHEN = "When to use it: "
SHOWN = {"model", "epochs", "batch_size", "lr", "schedule", "milestones", "momentum", "peak_momentum", "weight_decay"}
SHOWN |= {"augment", "problem", "modern"}
"""Fields of a recipe that have a column; others are told where they have not their default."""


def pages() -> dict[str, str]:
    """The Markdown of every method's page, by the name of its file."""
    results = json.loads((ROOT / "docs" / "results" / "digits.json").read_text(encoding="utf-8"))
    costs = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    return {path.stem: page(path, results, costs) for path, _ in packaged_problems()}


def page(path: Path, results: dict[str, Any], costs: str) -> str:
    """The page of one problem file.

    Args:
        path: the file.
        results: docs/results/digits.json.
        costs: the text of docs/methods.md, whose table says what a step costs.
    """
    source, name = path.read_text(encoding="utf-8"), path.stem
    module = importlib.import_module(f"bilevel_at.problems.{name}")
    first, *rest = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
    when = next((part for part in rest if part.startswith(WHEN)), "")
    rest = [part for part in rest if part != when]
    told = linked(prose("\n\n".join(rest)), name)
    sections = [
        f"# {title(first)}",
        _sentence(prose(first.split(": ", 1)[-1])),
        f"**When to use it.** {_sentence(linked(prose(_one_line(when.removeprefix(WHEN))), name))}" if when else "",
        f"```sh\npython -m bilevel_at.run problems/{name}.py\n```",
        "## Formula, source and published settings",
        told,
        "## What it is made of",
        _composition(module),
        "## Arguments",
        _arguments("problem", module.problem),
        _arguments("solver", module.solver) if hasattr(module, "solver") else "",
        "## Recipes",
        _recipes(module),
        "## What it costs",
        _cost(name, costs),
        "## Figures to expect",
        _figures(name, results),
        "## Code",
        f"`problems/{name}.py`, the whole method:",
        f"```python\n{source.rstrip()}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def title(first: str) -> str:
    """The method's name, from the first line of its file's docstring: "Fast-BAT (Zhang et al., 2022): …"."""
    return re.split(r" \(|: |, ", first)[0]


def linked(text: str, name: str) -> str:
    """The text with other problem files that it names, "fastat.py", linked to their pages."""
    others = {path.stem for path, _ in packaged_problems()} - {name}

    def link(match: re.Match[str]) -> str:
        stem = match[1].replace("\\", "")
        return f"[{stem}.py]({stem}.md)" if stem in others else match[0]

    return re.sub(r"(?<![\w/`\\])((?:\w|\\_)+)\.py\b", link, text)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [list(header), *(list(row) for row in rows)]
    written = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([written[0], "|" + "---|" * len(lines[0]), *written[1:]])


def _solver(module: Any) -> Any:
    return module.solver() if hasattr(module, "solver") else ZeroIG()


def _composition(module: Any) -> str:
    parts = describe(module.problem(), _solver(module))
    about = "What `--dry-run` prints, with the default arguments."
    rows = ((f"`{part.role}`", f"`{part.name}`", prose(part.about)) for part in parts)
    return f"{about}\n\n{table(('part', 'object', 'what it is'), rows)}"


def _arguments(what: str, function: Any) -> str:
    """The typed arguments of ``problem`` or ``solver``, which are flags of the command."""
    flags = flags_of(function)
    if not flags:
        return ""
    about = f"`{what}(...)` in Python; flags of the command."
    given = {flag.name: "solver" if (what, flag.name) == ("solver", "name") else flag.name for flag in flags}
    names = {flag: f"`--{name.replace('_', '-')}`" for flag, name in given.items()}
    rows = ((f"`{flag.name}`", _value(flag), names[flag.name], prose(flag.help)) for flag in flags)
    return f"{about}\n\n{table(('argument', 'default', 'flag', 'meaning'), rows)}"


def _value(flag: Flag) -> str:
    return f"`{_text(flag.default)}`"


def _text(value: Any) -> str:
    return radius_text(value) if isinstance(value, float) else str(value)


def _recipes(module: Any) -> str:
    """The training of each data set that the file states."""
    recipes: dict[str, Recipe] = module.recipe() if hasattr(module, "recipe") else {}
    if not recipes:
        return "None: the command's defaults hold."
    header = ("data", "network", "epochs", "batch", "rate", "momentum", "decay", "augmentation", "arguments, others")
    rows = [(f"`{data}`", *_recipe(recipe)) for data, recipe in recipes.items()]
    after = "What a data set has that is not named here: [Data](../methods.md#data)."
    return f"{table(header, rows)}\n\n{after}"


def _recipe(recipe: Recipe) -> tuple[str, ...]:
    rate = f"{recipe.schedule}, {recipe.lr:g}"
    if recipe.milestones:
        rate += ", ÷ 10 after " + ", ".join(map(str, recipe.milestones))
    momentum = f"{recipe.momentum:g}"
    if recipe.peak_momentum is not None:
        momentum += f" → {recipe.peak_momentum:g} → {recipe.momentum:g}"
    others = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in SHOWN and _differs(recipe, f)}
    told = ", ".join(f"`{name}={_text(value)}`" for name, value in {**recipe.problem, **others}.items())
    plain = (recipe.model, str(recipe.epochs), str(recipe.batch_size))
    return (*plain, rate, momentum, f"{recipe.weight_decay:g}", recipe.augment, told or "–")


def _differs(recipe: Recipe, field: Any) -> bool:
    return bool(getattr(recipe, field.name) != getattr(Recipe(), field.name))


def _cost(name: str, costs: str) -> str:
    """The method's line of the table of docs/methods.md."""
    for line in costs.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 4 and f"`{name}.py`" in cells[0]:
            times = (
                "" if cells[2] == "–" else f" A step costs {cells[2]} times one of standard training, in operations."
            )
            where = "of a PreActResNet-18 ([how it is counted](../methods.md#methods))"
            return f"The attacker: {cells[1]}.{times and times[:-1]}{f' {where}.' if times else ''}"
    raise ValueError(f"docs/methods.md has no line on {name}.py")


def _figures(name: str, results: dict[str, Any]) -> str:
    """What the digits' benchmark measured, best and last epoch."""
    rows = []
    for row in (row for row in results["rows"] if row == name or row.startswith(f"{name}-")):
        numbers = results["rows"][row]
        for which in ("best", "last"):
            cells = [_spread(numbers[f"{which} {attack}"]) for attack in ("clean", "fgsm", "pgd-50-10")]
            rows.append([f"`{row}`", which, *cells])
    about = (
        f"On the digits at ε = 0.2 in ℓ∞, {results['unit']}, mean ± standard deviation over seeds; "
        f"`{results['command']}`, {results['made']}. Rows that differ by little are not ranked: "
        "[all methods, and what the settings are](../results/digits.md)."
    )
    return f"{about}\n\n{table(('run', 'epoch', 'clean', 'FGSM', 'PGD-50-10'), rows)}"


def _spread(number: dict[str, float]) -> str:
    deviation = f" ± {number['std']:.1f}" if "std" in number else ""
    return f"{number['mean']:.1f}{deviation}"
