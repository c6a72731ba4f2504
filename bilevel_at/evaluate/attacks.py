"""Attacks by the names the field uses: ``clean``, ``fgsm``, ``pgd-K-R``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..constraints import Constraint, LinfBall
from ..errors import InputError
from ..losses import cross_entropy, minus
from ..lower import Linearized
from ..problem import LowerProblem

__all__ = ["Attack", "attack_from_name"]


@dataclass(frozen=True)
class Attack:
    """A named attack: solve ``lower`` ``restarts`` times and count the worst. ``lower=None`` is no attack.

    epsilon: the radius of the constraint, for the record.
    """

    name: str
    epsilon: float
    lower: LowerProblem | None = None
    restarts: int = 1


def attack_from_name(name: str, constraint: Constraint | float) -> Attack:
    """The attack of that name inside ``constraint``; a number ε stands for ``LinfBall(ε)``.

    ``clean``; ``fgsm``: one steepest step of the constraint's radius from 0; ``pgd-K`` or ``pgd-K-R``: K steepest steps
    of a quarter of it from each of R random starts, worst case over the starts. Steepest is the sign of the gradient
    in ℓ∞ and its direction elsewhere (:meth:`Constraint.attack_step`). Attacks see the model in eval mode.
    """
    if not isinstance(constraint, Constraint):
        constraint = LinfBall(constraint)
    if name == "clean":
        return Attack(name, 0.0)
    direction, radius = constraint.attack_step()
    match = re.fullmatch(r"fgsm|pgd-([1-9]\d*)(?:-([1-9]\d*))?", name)
    if not match:
        raise InputError(
            f"attack {name!r} is not known; attacks are clean, fgsm and pgd-STEPS-RESTARTS such as pgd-50-10"
        )
    if radius == 0:
        return Attack(name, radius)
    loss = minus(cross_entropy)
    if name == "fgsm":
        return Attack(name, radius, Linearized(loss, constraint, "zero", direction, step=radius))
    steps, restarts = int(match[1]), int(match[2] or 1)
    lower = Linearized.pgd(loss, constraint, steps, radius / 4, direction=direction)
    return Attack(name, radius, lower, restarts)
