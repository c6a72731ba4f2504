"""The words of the conformance command: its tables' cells, its remarks, and the page with its figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..conformance.measure import EXACT, Conformance, Point, Row
from ..conformance.problems import CONDITION, SIZE
from ..figures.conformance import draw
from ..runs.provenance import machine, today, versions

__all__ = ["HEADINGS", "cells", "provenance", "remarks", "write"]

BUDGETS = (5, 20, 40)
HEADINGS = (
    "library", "method", *(f"≤ {budget} products" for budget in BUDGETS), "last", "products", "products to 1e-6",
)  # fmt: skip


def provenance() -> dict[str, Any]:
    """Date, machine, and the versions that every row stands on."""
    return {"date": today(), "machine": machine(torch.device("cpu")), "python": versions()["python"]}


def cells(row: Row) -> list[str]:
    """One row of a table, as :data:`HEADINGS` has it."""
    needed, first_order = row.products_to(1e-6), not any(point.products for point in row.points)
    return [
        row.library,
        row.method,
        *("" if first_order else _error(row.within(budget)) for budget in BUDGETS),
        _error(row.last),
        str(row.last.products),
        "" if first_order else "–" if needed is None else str(needed),
    ]


def _error(point: Point | None) -> str:
    if point is None:
        return "–"
    if point.failure:
        return "failed"
    return "NaN" if math.isnan(point.error) else f"{point.error:.1e}"


def remarks(found: Conformance) -> list[str]:
    """What the tables do not say: versions, what is missing, notes, and failures in full."""
    lines = [f"Versions: {', '.join(f'{name} {version}' for name, version in found.versions.items())}."]
    lines += [f"{library}: {how}." for library, how in found.missing.items()]
    lines += [f"{library} is in the unconstrained problems alone: {why}." for library, why in found.without.items()]
    notes = {(row.library, row.method): row.note for row in found.rows if row.note}
    lines += [f"{library}, {method}: {note}." for (library, method), note in notes.items()]
    lines += [
        f"{row.library}, {row.method}: {row.last.gradients} gradients of g in δ on {row.problem}."
        for row in found.rows
        if row.method == "ValueFunction" and row.problem == next(iter(found.problems))
    ]
    failures = {(row.library, row.method, p.failure): None for row in found.rows for p in row.points if p.failure}
    lines += [f"{library}, {method} failed: {failure}." for library, method, failure in failures]
    return lines


def write(found: Conformance, path: Path, args: Sequence[str]) -> None:
    """The page, and its figure beside it under the same name."""
    figure = path.with_suffix(".png")
    draw(found, figure)
    about = provenance()
    seen = about["machine"]
    lines = [
        "# Hypergradients against closed forms",
        "",
        f"`python -m bilevel_at.conformance {' '.join(args)}`; {about['date']}, {seen['device']}, "
        f"{seen['threads']} threads, Python {about['python']}, float64. Versions are at the end.",
        "",
        "Every library is given the lower level's solution, so that only the differentiation is compared (but for "
        "JAXopt's OSQP, which solves first). The error is ‖G − dF/dθ‖ / ‖dF/dθ‖ for the known dF/dθ. A product is one "
        "pass back through ∇_δ g, a product with a second derivative of g; it is counted inside g, or in JAX inside "
        "the linear solver, so that no library reports its own. The last of them is with the cross derivative. A dense "
        f"Hessian counts as a product a column. δ has {SIZE} values, and the quadratic problem's Hessian a condition "
        f"of {CONDITION:g}. f(θ, δ) = ½‖δ − t‖² + θᵀMδ + ½‖θ‖² throughout. Errors below {EXACT:.0e} are rounding.",
        "",
        "A column `≤ n products` has the error of the best setting that takes no more than n; `last` is that of the "
        "best setting tried, `products` what it takes, and `products to 1e-6` those from which on the error stays "
        "below 1e-6.",
        "",
        f"![relative error against products, a panel for each problem]({figure.name})",
    ]
    for problem, formula in found.problems.items():
        lines += ["", f"## {problem[0].upper()}{problem[1:]}", "", f"g = {formula}", ""]
        lines += [f"| {' | '.join(HEADINGS)} |", "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
        lines += [f"| {' | '.join(cells(row))} |" for row in found.rows if row.problem == problem]
    cg = [row for row in found.rows if row.library == "Betty" and row.method == "cg"]
    if cg:
        lines += ["", "## Betty's conjugate gradients, by iterations", ""]
        values = [point.value for point in cg[0].points]
        lines += [f"| problem | {' | '.join(f'{value:g}' for value in values)} |", "|---|" + "---:|" * len(values)]
        lines += [f"| {row.problem} | {' | '.join(_error(point) for point in row.points)} |" for row in cg]
    lines += ["", "## Versions and notes", "", *(f"- {line}" for line in remarks(found))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
