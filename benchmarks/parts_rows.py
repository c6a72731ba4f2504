"""The rows of ``parts.py``: flags of ``problems/composed.py``, each with the row that it is compared with."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["BASE", "COMPOSITIONS", "PARTS", "ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """A composition.

    name: of the row.
    part: what is exchanged.
    beside: the row that differs by this part alone; "" for the base.
    flags: of ``problems/composed.py``; a number before ε is a multiple of it, and one before E of the usual epochs.
    """

    name: str
    part: str
    beside: str
    flags: str = ""

    def of(self, epsilon: float, epochs: int) -> list[str]:
        """The flags with numbers in the place of ε and E."""
        text = re.sub(r"([\d.]+)ε", lambda found: repr(float(found[1]) * epsilon), self.flags)
        return re.sub(r"([\d.]+)E\b", lambda found: str(round(float(found[1]) * epochs)), text).split()


BASE = "one sign step"
TAYLOR2 = "--anchor gradient-step --direction taylor"
PARTS = (
    Row(BASE, "–", ""),
    Row("from 0", "anchor", BASE, "--anchor zero"),
    Row("from a corner", "anchor", BASE, "--anchor corner"),
    Row("from noise", "anchor", BASE, "--anchor noise"),
    Row("remembered", "anchor", BASE, "--anchor remembered"),
    Row("remembered, never redrawn", "anchor", "remembered", "--anchor remembered --reset-every 0"),
    Row("from a sign step", "anchor", BASE, "--anchor sign-step"),
    Row("from a gradient step", "anchor", BASE, "--anchor gradient-step"),
    Row("step 0.5 ε", "step", BASE, "--step 0.5ε"),
    Row("step 1.25 ε", "step", BASE, "--step 1.25ε"),
    Row("step 2 ε", "step", BASE, "--step 2ε"),
    Row("remembered, adaptive", "step", "remembered", "--anchor remembered --adaptive"),
    Row("PGD-2, of 0.5 ε", "number of steps", "step 0.5 ε", "--steps 2 --step 0.5ε"),
    Row("PGD-7, of 0.25 ε", "number of steps", "PGD-2, of 0.5 ε", "--steps 7 --step 0.25ε"),
    Row("one unsigned step", "direction", BASE, "--direction taylor"),
    Row("two unsigned steps", "direction", "from a gradient step", TAYLOR2),
    Row("QUB", "upper loss", BASE, "--upper qub"),
    Row("TRADES' loss", "upper loss", BASE, "--upper trades"),
    Row("GradAlign 0.2", "upper loss", BASE, "--upper gradalign --weight 0.2"),
    Row("implicit term × 0.1 (Fast-BAT)", "solver", "two unsigned steps", f"{TAYLOR2} --solver hessian-free-kkt"),
    Row(
        "the same in every 4th step",
        "solver",
        "implicit term × 0.1 (Fast-BAT)",
        f"{TAYLOR2} --solver lazy --inner hessian-free-kkt",
    ),
    Row(
        "implicit term × 1 (1/λ)",
        "solver",
        "two unsigned steps",
        f"{TAYLOR2} --solver hessian-free-kkt --ig-factor 1",
    ),
    Row(
        "exact (weight 1)",
        "solver",
        "two unsigned steps",
        f"{TAYLOR2} --solver hessian-free-kkt --ig-weight 1",
    ),
    Row(
        "Hessian-aware × 0.1, damped where needed",
        "solver",
        "implicit term × 0.1 (Fast-BAT)",
        f"{TAYLOR2} --solver gauss-newton-kkt --damping auto",
    ),
    Row("attacks in train mode", "recipe", BASE, "--mode train"),
    Row("averaged weights", "recipe", BASE, "--ema 0.99"),
    Row("label smoothing 0.1", "recipe", BASE, "--label-smoothing 0.1"),
    Row("one-cycle rate", "recipe", BASE, "--schedule one-cycle"),
    Row("AWP 0.005", "recipe", BASE, "--gamma 0.005"),
    Row("twice the epochs", "recipe", BASE, "--epochs 2E"),
)
"""Rows that differ from another by one part."""

COMPOSITIONS = (
    Row("two unsigned steps, QUB", "composition", "two unsigned steps", f"{TAYLOR2} --upper qub"),
    Row("from noise, QUB", "composition", "from noise", "--anchor noise --upper qub"),
    Row("remembered, QUB", "composition", "remembered", "--anchor remembered --upper qub"),
    Row(
        "remembered, adaptive, QUB",
        "composition",
        "remembered, adaptive",
        "--anchor remembered --adaptive --upper qub",
    ),
    Row("from a sign step, QUB", "composition", "from a sign step", "--anchor sign-step --upper qub"),
    Row("from a gradient step, QUB", "composition", "from a gradient step", "--anchor gradient-step --upper qub"),
    Row("PGD-2, QUB", "composition", "PGD-2, of 0.5 ε", "--steps 2 --step 0.5ε --upper qub"),
    Row(
        "remembered, QUB, averaged",
        "composition",
        "remembered, QUB",
        "--anchor remembered --upper qub --ema 0.99",
    ),
    Row(
        "remembered, TRADES' loss",
        "composition",
        "remembered",
        "--anchor remembered --upper trades",
    ),
    Row(
        "remembered, PGD-2, QUB",
        "composition",
        "PGD-2, QUB",
        "--anchor remembered --steps 2 --step 0.5ε --upper qub",
    ),
    Row(
        "remembered, adaptive, twice the epochs",
        "composition",
        "remembered, adaptive",
        "--anchor remembered --adaptive --epochs 2E",
    ),
    Row(
        "remembered, adaptive, averaged, twice the epochs",
        "composition",
        "remembered, adaptive, twice the epochs",
        "--anchor remembered --adaptive --epochs 2E --ema 0.99",
    ),
    Row(
        "remembered, adaptive, never redrawn, twice the epochs",
        "composition",
        "remembered, adaptive, twice the epochs",
        "--anchor remembered --adaptive --epochs 2E --reset-every 0",
    ),
    Row(
        "remembered, twice the epochs",
        "composition",
        "remembered",
        "--anchor remembered --epochs 2E",
    ),
    Row(
        "remembered, QUB, 1.4 × the epochs",
        "composition",
        "remembered, QUB",
        "--anchor remembered --upper qub --epochs 1.4E",
    ),
    Row("PGD-7, QUB", "composition", "PGD-7, of 0.25 ε", "--steps 7 --step 0.25ε --upper qub"),
)
"""Combinations of parts, searched for one that does better at Fast-BAT's cost."""

ROWS = {row.name: row for row in (*PARTS, *COMPOSITIONS)}
