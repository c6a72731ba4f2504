"""Attacks, by their usual names: ``clean fgsm pgd-50-10 beta-30 nearest-40-3-2 apgd-t square autoattack``."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anchors import Anchor, Gaussian
from ..batch import Batch
from ..constraints import Constraint, LinfBall
from ..errors import InputError
from ..losses import cross_entropy, minus
from ..lower import Linearized
from ..problem import LowerProblem
from .ensemble import COMPONENTS, VERSIONS, Component
from .nearest import Nearest
from .stages import Descent, Margins, NormalizedSteps, OnSurrogate, Scaled, Stage
from .threat import Norm, Threat, ball, can_sample, norm_of, set_name

__all__ = ["ATTACKS", "Attack", "Norm", "Surrogates", "attack_from_name", "ball", "norm_of"]

ATTACKS = {
    "clean": "no attack",
    "fgsm": "one step of length ε from 0",
    "pgd-K-R": "K steps of ε/4 from each of R random starts; pgd-K-R-any counts every step, not only the last",
    "beta-K-R": "the margin of every class, K steps, R starts; beta-K-topN: the nearest N first; beta-K-adam",
    "nearest-K-N-R": "PGD, then the N nearest classes by margin over gradient, K steps each, R times: nearest-40-3-2",
    "apgd-ce, apgd-dlr, apgd-t, fab, fab-t": "AutoAttack's own parts, by their names there",
    "square": "5,000 queries without any gradient: the check on gradient masking",
    "autoattack": "apgd-ce, apgd-t, fab-t, square, each on what is left; and autoattack-plus, autoattack-rand",
    "transfer:RUN": "PGD-50-10 against the network of another run; transfer:RUN:ATTACK for another attack",
}
"""A description of every attack, by name."""

Surrogates = Mapping[str, nn.Module] | Callable[[str], nn.Module]
"""Networks by the name in ``transfer:NAME``, or a function from such a name to its network."""
ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
"""Optimisers that treat examples and classes separately."""


@dataclass(frozen=True, eq=False)
class Attack:
    """A sequence of stages. Each stage attacks the examples that are still classified correctly after earlier stages.

    Args:
        name: the name in results.
        constraint: C(x); perturbations outside it do not count. None for no attack.
        stages: the stages in order; empty for no attack.
    """

    name: str
    constraint: Constraint | None = None
    stages: Sequence[Stage] = ()

    @property
    def epsilon(self) -> float:
        """The radius of the constraint: 0 without a constraint, NaN if the constraint has no radius."""
        if self.constraint is None:
            return 0.0
        radius = getattr(self.constraint, "radius", None)
        return math.nan if radius is None else float(radius)

    @property
    def threat(self) -> Threat | None:
        """The record of the constraint; None without a constraint."""
        return None if self.constraint is None else Threat.of(self.constraint)

    @classmethod
    def solving(cls, name: str, lower: LowerProblem, restarts: int = 1) -> Attack:
        """An attack that solves a lower problem.

        Args:
            name: the name in results.
            lower: the lower problem.
            restarts: how often it is solved; an example is broken if any solution breaks it.
        """
        return cls(name, lower.constraint, [Descent(lower, restart) for restart in range(restarts)])

    def perturb(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Attack a batch with all stages.

        Args:
            model: the network, in the mode it is attacked in.
            batch: the examples.
            generator: of all random draws.

        Returns:
            x + δ ``[B, ...]``: of the stage that breaks an example, or of the last stage if none does.
        """
        attacked, standing = batch.x.clone(), torch.arange(len(batch), device=batch.x.device)
        for stage in self.stages:
            if len(standing) == 0:
                break
            part = batch[standing]
            attacked[standing] = moved = stage(model, part, generator)
            with torch.no_grad():
                standing = standing[model(moved).argmax(1) == part.y]
        return attacked


def attack_from_name(
    name: str, constraint: Constraint | float, seed: int = 0, surrogates: Surrogates | None = None
) -> Attack:
    """Make an attack from its name. Attacks see the model in eval mode.

    FGSM and PGD take steepest-ascent steps: the sign of the gradient in ℓ∞, its direction elsewhere
    (``Constraint.steepest``). PGD's step is a quarter of the radius. BETA (Robey et al., 2023, Algorithm 1) takes K
    steps in total for each class, of RMSprop or, outside ℓ∞, along the gradient. Its rates fall from ε/2 to 0; every
    step counts. With ten steps or more in ℓ∞, they are divided into five short descents and a longer one from the best
    result (:class:`Margins`). ``nearest-K-N-R`` is :class:`~bilevel_at.evaluate.nearest.Nearest`.

    A user-defined constraint needs only ``project``. Without ``reach`` or ``radius``, its size is measured once per
    batch (:func:`~bilevel_at.evaluate.threat.measured_reach`); without ``steepest``, steps go along the gradient;
    without ``sample``, attacks start from a projected normal draw.

    Args:
        name: one of :data:`ATTACKS`.
        constraint: C(x); a number ε stands for ``LinfBall(ε)``.
        seed: of AutoAttack and its parts, which draw from their own generator.
        surrogates: the networks of ``transfer:NAME`` attacks by name, or a function from a name to its network.

    Raises:
        InputError: for an unknown name, and if AutoAttack does not support the constraint.
    """
    if not isinstance(constraint, Constraint):
        constraint = LinfBall(constraint)
    if name == "clean":
        return Attack(name)
    stages = _stages(name, constraint, seed, surrogates)
    return Attack(name, constraint, () if getattr(constraint, "radius", None) == 0 else stages)


def _stages(name: str, constraint: Constraint, seed: int, surrogates: Surrogates | None) -> list[Stage]:
    if name in COMPONENTS or name in VERSIONS:
        norm, radius = norm_of(constraint), getattr(constraint, "radius", None)
        if norm is None or radius is None:
            own = set_name(constraint)
            raise InputError(f"attack {name!r} knows l∞ and l2 balls around images in [0, 1] only, not {own}")
        version, parts = VERSIONS.get(name, ("standard", (name,)))
        return [Component(part, norm, radius, version, seed) for part in parts]
    if name.startswith("transfer:"):
        return _transferred(name, constraint, seed, surrogates)
    reach = getattr(constraint, "reach", None)
    reach = getattr(constraint, "radius", None) if reach is None else reach
    if reach is not None:
        return _of_reach(name, constraint, reach)
    direction = getattr(constraint, "steepest", "normalized")

    def scaled(place: int, unit: Stage) -> Stage:
        return Scaled(constraint, direction, unit, lambda reach: _of_reach(name, constraint, reach)[place])

    return [scaled(place, unit) for place, unit in enumerate(_of_reach(name, constraint, 1.0))]


def _of_reach(name: str, constraint: Constraint, reach: float) -> list[Stage]:
    """The stages of this library's own attacks, with steps for a constraint of that size."""
    direction = getattr(constraint, "steepest", "normalized")
    start: Anchor | str = "uniform" if can_sample(constraint) else Gaussian(reach / 2 or 1.0)
    if name == "fgsm":
        return [Descent(Linearized(minus(cross_entropy), constraint, "zero", direction, reach or 1.0))]
    if match := re.fullmatch(r"pgd-([1-9]\d*)(?:-([1-9]\d*))?(-any)?", name):
        steps, restarts = int(match[1]), int(match[2] or 1)
        descend = Linearized(minus(cross_entropy), constraint, start, direction, reach / 4 or 1.0)
        return [Descent(descend, i, steps, any_step=bool(match[3]), cycles=True) for i in range(restarts)]
    if match := re.fullmatch(r"beta-([1-9]\d*)(?:-([1-9]\d*))?(?:-top([1-9]\d*))?(?:-([a-z]+))?", name):
        steps, restarts, top = int(match[1]), int(match[2] or 1), match[3] and int(match[3])
        groups = [None] if not top else [(0, top), (top, None)]
        starts = 5 if steps >= 10 and direction == "sign" else 1  # several starts only help in a ball with corners
        usual = torch.optim.RMSprop if direction == "sign" else NormalizedSteps
        by = _optimizer(match[4], name) if match[4] else usual
        return [
            Margins(constraint, steps, reach / 2 or 1.0, i, group, starts, by, start)
            for i in range(restarts)
            for group in groups
        ]
    if match := re.fullmatch(r"nearest-([1-9]\d*)-([1-9]\d*)(?:-([1-9]\d*))?", name):
        steps, nearest, restarts = int(match[1]), int(match[2]), int(match[3] or 1)
        return [Nearest(constraint, steps, nearest, reach or 1.0, i, start) for i in range(restarts)]
    known = ["fgsm", "pgd-50-10", "beta-30", "nearest-40-3-2", *COMPONENTS, *VERSIONS]
    close = difflib.get_close_matches(name, known, 1)
    raise InputError(
        f"attack {name!r} is not known; attacks are clean, fgsm, pgd-STEPS-RESTARTS such as pgd-50-10, beta-STEPS, "
        f"nearest-STEPS-CLASSES such as nearest-40-3-2, {', '.join([*COMPONENTS, *VERSIONS])} and transfer:RUN"
        f"{f'; did you mean {close[0]}?' if close else ''}"
    )


def _optimizer(name: str, attack: str) -> type[torch.optim.Optimizer]:
    known = {kind.__name__.lower(): kind for kind in ELEMENTWISE}
    if name not in known:
        raise InputError(f"attack {attack!r}: optimiser {name!r} is not known; choose from {', '.join(sorted(known))}")
    return known[name]


def _transferred(name: str, constraint: Constraint, seed: int, surrogates: Surrogates | None) -> list[Stage]:
    source, attack = name.removeprefix("transfer:"), "pgd-50-10"
    head, colon, tail = source.rpartition(":")
    if colon and not {"/", "\\"} & set(tail):  # the part after the last colon is an attack, unless it is a path
        source, attack = head, tail
    if attack.startswith(("transfer", "clean")):
        raise InputError(f"attack {name!r} transfers {attack!r}; it takes an attack that looks at a network")
    stages = _stages(attack, constraint, seed, surrogates)
    network = _surrogate(name, source, surrogates)
    return [OnSurrogate(stage, network, source) for stage in stages]


def _surrogate(name: str, source: str, surrogates: Surrogates | None) -> nn.Module:
    if callable(surrogates):
        return surrogates(source)
    if surrogates is None or source not in surrogates:
        known = f"; there are {', '.join(surrogates)}" if surrogates else ""
        raise InputError(f"attack {name!r} needs the network {source!r}: surrogates={{{source!r}: model}}{known}")
    return surrogates[source]
