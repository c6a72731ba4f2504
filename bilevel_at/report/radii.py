"""Robust accuracy against ε."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..figures import comparison
from ..runs.record import attack_and_radius
from .groups import Group
from .numbers import Spread, in_255ths, number, percent, radius
from .page import Figure, Section

__all__ = ["by_radius", "radii"]

MOST_PANELS = 4
Curve = list[tuple[float, float]]


def radii(groups: Sequence[Group], folder: Path) -> Section | None:
    """A line for each group under each attack that was run at two radii or more."""
    curves = by_radius(groups)
    if not curves:
        return None
    most = max(len(curve) for panel in curves.values() for curve in panel.values())
    shown = sorted(curves, key=lambda a: -max(len(c) for c in curves[a].values()))[:MOST_PANELS]
    panels = {attack: curves[attack] for attack in curves if attack in shown}
    threats = {group.threat.key: group.threat for group in groups}
    epsilon = next(iter(threats.values())).epsilon if len(threats) == 1 else None
    every = [e for panel in panels.values() for curve in panel.values() for e, _ in curve if e > 0]
    path = folder / "radii.png"
    if any(name.endswith(("-l2", "-linf")) for name in panels):
        epsilon = None  # the ε of the threat is of another norm
    ticks = all(in_255ths(e) is not None for e in every)
    comparison.accuracy_by_radius(panels, path, epsilon, ticks, [group.label for group in groups])
    sentences = [_caption(attack, panel, epsilon) for attack, panel in panels.items()]
    sentences += (
        ["Lines are means over seeds."]
        if any(len(g.runs) > 1 and g.label in p for g in groups for p in panels.values())
        else []
    )
    return Section("Accuracy against ε", [Figure(path, " ".join(sentences), f"Accuracy at up to {most} radii")])


def by_radius(groups: Sequence[Group]) -> dict[str, dict[str, Curve]]:
    """attack -> group -> (ε, mean accuracy over seeds) by rising ε, from clean accuracy at 0; of the main checkpoint.

    Only groups with results at two radii or more are included. Results in another norm than the threat's are under a
    name of their own, such as ``pgd-50-10-l2``; if threats differ in the norm, so are the results in every norm.
    """
    norms = {group.threat.norm or "linf" for group in groups if group.threat.is_ball}
    usual = next(iter(norms)) if len(norms) == 1 else None
    panels: dict[str, dict[str, Curve]] = {}
    for group in groups:
        values: dict[str, dict[float, list[float]]] = {}
        clean: list[float] = []
        for run in group.runs:
            for name, entry in run.results.get(group.main or "", {}).items():
                at = round(number(entry.get("epsilon")), 9)
                if name == "clean":
                    clean.append(entry["accuracy"])
                elif at > 0 and not entry.get("threat"):
                    norm = str(entry.get("norm") or group.threat.norm or "linf")
                    attack = attack_and_radius(name)[0].removesuffix(f"-{norm}") + (f"-{norm}" if norm != usual else "")
                    values.setdefault(attack, {}).setdefault(at, []).append(entry["accuracy"])
        for attack, radii in values.items():
            if len(radii) > 1:
                start = {0.0: clean} if clean else {}
                curve = [(e, Spread(tuple(v)).mean) for e, v in sorted({**start, **radii}.items())]
                panels.setdefault(attack, {})[group.label] = curve
    return panels


def _caption(attack: str, panel: Mapping[str, Curve], trained: float | None) -> str:
    def at(curve: Curve, epsilon: float) -> float:
        return next((a for e, a in curve if math.isclose(e, epsilon, abs_tol=1e-8)), math.nan)

    largest = max(e for curve in panel.values() for e, _ in curve)
    ends = {label: a for label, curve in panel.items() if not math.isnan(a := at(curve, largest))}
    highest = max(ends, key=lambda label: ends[label])
    sentences = []
    if trained is not None:
        here = ", ".join(f"{k} {percent(a)}%" for k, c in panel.items() if not math.isnan(a := at(c, trained)))
        sentences.append(f"{here} at ε = {radius(trained)}" if here else "")
    end = f"{percent(ends[highest])}% at ε = {radius(largest)}, the largest radius"
    if ends[highest] <= 0.01:
        sentences.append(
            f"{'no training keeps more than' if len(ends) > 1 else 'it keeps'} {end}: nothing hinders the attack there"
        )
    else:
        sentences.append(
            f"{highest} still has {end}; only larger radii tell whether it falls to 0, as it must if nothing hinders it"
        )
    return f"Under {attack}: " + "; ".join(s for s in sentences if s) + "."
