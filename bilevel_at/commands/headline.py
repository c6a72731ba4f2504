"""What the worst case of a printed table is of."""

from __future__ import annotations

from collections.abc import Mapping

from ..runs.headline import WorstCase

__all__ = ["caption"]


def caption(worst: Mapping[str, WorstCase]) -> str:
    """The attacks that the worst cases are of, by network where they differ."""
    of = {name: ", ".join(w.attacks) + ("" if w.exact else " (the least of them)") for name, w in worst.items()}
    if len(set(of.values())) == 1:
        return f"worst case of {next(iter(of.values()))}"
    return "worst case of " + "; ".join(f"{attacks} ({name.replace('_', ' ')})" for name, attacks in of.items())
