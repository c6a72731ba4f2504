"""The page of ``implicit.py``, from its lines alone."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from implicit_cells import Lines, Record, Row, accuracy, difference, geometric, last, mean, own, spread, unbiased
from implicit_figure import draw
from implicit_measures import LENGTHS, valid_length
from implicit_words import FINDINGS_OF, TEXT, findings

PGD, NEAREST = accuracy("pgd-50-10"), accuracy("nearest-40-3-2")
NAMES = {
    "scan": "as published: one unsigned step before, ReLU",
    "uniform": "anchor uniform: nothing of z depends on θ",
    "swish": "smooth network (swish)",
    "through": "derivative through the anchor too",
    "noise": "noise of the term's length",
    "coin": "the term with a coin's sign",
}


def fingerprint(records: Sequence[Record]) -> str:
    """Of the settings and accuracies: findings that were written by hand belong to one set of lines."""
    parts = [[r["key"], r["settings"], r.get("results")] for r in sorted(records, key=lambda r: r["key"])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def table(head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    names = head.split(" | ")
    return [f"| {head} |", "|" + "---|" * len(names), *(f"| {' | '.join(row)} |" for row in rows), ""]


def outcome(row: Row, beside: Row) -> list[str]:
    """Accuracies, the difference in PGD to the same without the term, F, R, and the difference in each."""
    return [
        spread(row, accuracy("clean")),
        spread(row, PGD),
        mean(row, NEAREST, 1),
        difference(row, beside, PGD),
        mean(row, last("F")),
        difference(row, beside, last("F"), 2),
        mean(row, last("R")),
        difference(row, beside, last("R"), 2),
        mean(row, last("alignment")),
    ]


OUTCOME = "clean | PGD-50-10 | nearest | PGD, difference | F | difference | R | difference | alignment"


def scan(lines: Lines) -> list[str]:
    rows = []
    for part in ("scan", "smaller"):
        for epsilon in lines.values("epsilon", part=part):
            for step in reversed(lines.values("step", part=part)):
                settings = {"part": part, "epsilon": epsilon, "step": step}
                for weight in lines.values("weight", **settings):
                    row, beside = lines.row(weight=weight, **settings), lines.row(**settings)
                    published = " (0.1 λ)" if abs(weight * step - 0.1) < 1e-9 else ""
                    about = [f"{epsilon:g}", f"{step:g}", f"{weight:.3g}{published}", str(len(row))]
                    rows.append([*about, *outcome(row, beside if weight else {})])
    return table(f"ε | 1/λ | weight | seeds | {OUTCOME}", rows)


def positive(record: Record) -> float:
    """The share of samples whose ∇²ℓ_atk + λI is positive definite in all coordinates."""
    lam = 1 / record["settings"]["step"]
    return statistics.mean(value + lam > 0 for value in record["least_curvature"])


def share_as_trained(record: Record) -> float:
    return statistics.mean(record["ratios"])


def terms(lines: Lines) -> list[str]:
    rows = []
    for part in ("scan", "smaller"):
        for epsilon in lines.values("epsilon", part=part):
            for step in reversed(lines.values("step", part=part)):
                for weight in lines.values("weight", part=part, epsilon=epsilon, step=step):
                    row = lines.row(part=part, epsilon=epsilon, step=step, weight=weight)
                    if weight not in (0, 1) and abs(weight * step - 0.1) > 1e-9:
                        continue
                    cells = [
                        mean(row, share_as_trained, 3) if weight else "–",
                        *(mean(row, last(name)) for name in ("ratio", "free", "cosine")),
                        mean(row, lambda r: unbiased(r["signal"]["direct"]), 3),
                        mean(row, lambda r: unbiased(r["signal"]["implicit"]), 3),
                        *(mean(row, last(name)) for name in ("true_direct", "true_implicit", "cosine_through")),
                        mean(row, last("alignment")),
                        mean(row, last("attack_gradient")),
                        mean(row, lambda r: statistics.median(r["least_curvature"]), 1),
                        mean(row, positive),
                    ]
                    rows.append([f"{epsilon:g}", f"{step:g}", f"{weight:.3g}", *cells])
    head = (
        "ε | 1/λ | weight | share as trained | share at weight 1 | free | cosine | signal, direct | signal, implicit "
        "| direct, ∇R | implicit, ∇R | through z | alignment | ‖∇_δ ℓ‖ at z | λ_min | + λ > 0"
    )
    return table(head, rows)


def causes(lines: Lines) -> list[str]:
    kinds: dict[str, dict[str, Any]] = {
        "scan": {},
        "uniform": {"part": "causes", "anchor": "uniform"},
        "swish": {"part": "causes", "activation": "swish"},
    }
    rows = []
    for name, settings in kinds.items():
        for weight in (0.0, 1.0):
            row, beside = lines.row(weight=weight, **settings), lines.row(**settings) if weight else {}
            rows.append([NAMES[name], "exact" if weight else "none", str(len(row)), *outcome(row, beside)])
    for term in ("through", "noise", "coin"):
        row = lines.row(part="causes", weight=1.0, term=term)
        rows.append([NAMES["scan"], NAMES[term], str(len(row)), *outcome(row, lines.row())])
    return table(f"training at 1/λ = 20 | term | seeds | {OUTCOME}", rows)


def went_on(lines: Lines) -> list[tuple[list[str], Row, Row]]:
    """(network, peak rate and term; the runs; those without the term) of the runs that go on from a trained network."""
    found = []
    for activation, name in (("relu", "ReLU"), ("swish", "swish")):
        for lr in reversed(lines.values("lr", part="after", activation=activation)):
            beside = lines.row(part="after", lr=lr, activation=activation)
            found.append(([name, f"{lr:g}", "none"], beside, {}))
            for term, words in {**NAMES, "implicit": "exact"}.items():
                row = lines.row(part="after", lr=lr, activation=activation, weight=1.0, term=term)
                if row:
                    found.append(([name, f"{lr:g}", words], row, beside))
    return found


def after(lines: Lines) -> list[str]:
    """What training from a trained network makes of it, beside the same training without the term."""
    smooth = lines.row(part="causes", activation="swish")
    rows = [
        [name, "–", "before", str(len(row)), *outcome(row, {})]
        for name, row in (("ReLU", lines.row()), ("swish", smooth))
    ]
    rows += [[*about, str(len(row)), *outcome(row, beside)] for about, row, beside in went_on(lines)]
    return table(f"network | peak rate | term | seeds | {OUTCOME}", rows)


def segments(lines: Lines) -> list[str]:
    """The change of F beside the integral of its derivative."""

    def part(name: str) -> Callable[[Record], float]:
        return lambda record: record["segment"][name]

    def jumps(record: Record) -> float:
        return record["segment"]["change"] - record["segment"]["integral"]

    rows = []
    for about, row, _ in went_on(lines):
        cells = [mean(row, part(name), 3) for name in ("change", "integral", "direct", "implicit")]
        rows.append([*about, str(len(row)), *cells, own(row, jumps)])
    return table("network | peak rate | term | seeds | change of F | integral | of d | of i | jumps", rows)


def rates(lines: Lines) -> list[str]:
    rows = []
    for lr in reversed(lines.values("lr", part="rates")):
        beside = lines.row(part="rates", lr=lr)
        for weight in (0.0, 1.0):
            row = lines.row(part="rates", lr=lr, weight=weight)
            rows.append([f"{lr:g}", f"{weight:g}", str(len(row)), *outcome(row, beside if weight else {})])
    return table(f"peak rate | weight | seeds | {OUTCOME}", rows)


def reach(looks: Sequence[Any]) -> list[str]:
    """Cells of one epoch's looks, one for each seed."""
    valid = [valid_length(look["h"]["slope"], look["h"]["own"]) for look in looks]
    best = [
        f"{statistics.mean(max(look[u][where]) for look in looks):.4f}"
        for where in ("own", "other")
        for u in ("h", "d")
    ]
    norm = statistics.mean(look["h"]["norm"] / look["d"]["norm"] for look in looks)
    return [str(looks[0]["epoch"]), str(len(looks)), geometric(valid, LENGTHS[0]), f"{norm:.2f}", *best]


def lengths(lines: Lines) -> list[str]:
    """How far the hypergradient's prediction reaches, and how much a step can lower F."""
    rows = []
    kinds = [({"step": step}, f"{step:g}") for step in reversed(lines.values("step", part="scan", lengths=True))]
    kinds.append(({"part": "causes", "activation": "swish"}, "20, swish"))
    counts = [sum("steps" in r for r in lines.row(**settings).values()) for settings, _ in kinds]
    for (settings, name), count in zip(kinds, counts, strict=True):
        if count < max(counts):  # of one seed among several nothing can be said
            continue
        for weight in (0.0, 1.0):
            row = lines.row(weight=weight, **settings)
            for looks in zip(*(record["steps"] for record in row.values() if "steps" in record), strict=True):
                rows.append([name, f"{weight:g}", *reach(looks)])
    head = "1/λ | weight | epoch | seeds | valid length | ‖h‖/‖d‖ | own, along h | own, along d | other, h | other, d"
    return table(head, rows)


def write_page(records: Sequence[Record], folder: Path) -> None:
    """The page and its figure."""
    lines = Lines(records)
    draw(lines, folder / "implicit.png")
    some, days = records[0], sorted({record["date"] for record in records})
    mark = fingerprint(records)
    page = [
        "# Where the implicit term matters",
        "",
        f"`python benchmarks/implicit.py --write docs/results`, {' to '.join(sorted({days[0], days[-1]}))}, "
        f"{some['device']}, 1 thread a run, torch {some['versions']['torch']}, Python {some['versions']['python']}. "
        f"{len(records)} runs, each a line of [implicit.jsonl](implicit.jsonl); {len(lines.failed)} did not end "
        f"(a loss that is not finite). Fingerprint of the lines: {mark}.",
        "",
        *TEXT["setting"],
        findings(lines) if mark == FINDINGS_OF else "",
        "",
        *TEXT["figure"],
    ]
    for name, make in (
        ("scan", scan),
        ("terms", terms),
        ("causes", causes),
        ("after", after),
        ("segments", segments),
        ("lengths", lengths),
        ("rates", rates),
    ):
        page += [*TEXT[name], *make(lines)]
    (folder / "implicit.md").write_text("\n".join(page).replace("\n\n\n", "\n\n"), encoding="utf-8")
