"""The threat model: the constraint of attacks, its name, and its size."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..constraints import Constraint, L2Ball, LinfBall
from ..errors import InputError
from .radius import radius_text

__all__ = ["Norm", "Threat", "ball", "can_sample", "check_set", "measured_reach", "norm_of", "set_name"]

Norm = str
_BALLS: dict[str, type[LinfBall] | type[L2Ball]] = {"linf": LinfBall, "l2": L2Ball}
_SIGNS = {"linf": "ℓ∞", "l2": "ℓ2"}
LONGEST = 120  # letters of a set's name
SEEN = 8  # examples at which a set is measured
FAR = 10.0  # the scale of the normal draws that are projected: inputs are in [0, 1]
SAME_POINT = 1e-5  # tolerance for a second projection, as in evaluation


def ball(norm: Norm, epsilon: float) -> LinfBall | L2Ball:
    """The ℓ∞ or ℓ2 ball of that radius around images in [0, 1]."""
    if norm not in _BALLS:
        raise InputError(f"norm {norm!r} is not known; choose from {', '.join(_BALLS)}")
    return _BALLS[norm](epsilon, (0, 1))


def norm_of(constraint: Constraint | None) -> Norm | None:
    """linf or l2 for a ball around images in [0, 1]; None for anything else."""
    in_range = getattr(constraint, "bounds", None) == (0, 1)
    return next((name for name, kind in _BALLS.items() if in_range and type(constraint) is kind), None)


def set_name(constraint: Constraint) -> str:
    """The set's ``name``, where it has one; otherwise its repr, or its class with its settings: "Diamond(size=0.3)"."""
    own = getattr(constraint, "name", None)
    if isinstance(own, str) and own.strip():
        text = own
    elif not dataclasses.is_dataclass(constraint) and type(constraint).__repr__ is not object.__repr__:
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(constraint))
    else:
        settings = ", ".join(f"{name}={_short(value)}" for name, value in _settings(constraint).items())
        text = f"{type(constraint).__name__}({settings})"
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _settings(constraint: Constraint) -> dict[str, Any]:
    """The settings of a constraint: the printed fields of a dataclass, or the public attributes of any other object."""
    if dataclasses.is_dataclass(constraint):
        return {f.name: getattr(constraint, f.name, None) for f in dataclasses.fields(constraint) if f.repr}
    return {name: value for name, value in vars(constraint).items() if not name.startswith("_")}


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _content(value: Any) -> bytes:
    """The bytes to hash for a fingerprint, including the values of tensors."""
    if isinstance(value, Tensor):
        return repr((value.dtype, value.shape)).encode() + value.detach().cpu().contiguous().numpy().tobytes()
    if isinstance(value, Mapping):
        return b"{" + b",".join(_content(k) + b":" + _content(v) for k, v in value.items()) + b"}"
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(_content, value)) + b"]"
    return _short(value).encode()


@dataclass(frozen=True)
class Threat:
    """The record of a threat model, for files and pages.

    norm: linf or l2 for a ball around images in [0, 1], None for any other set.
    epsilon: the radius, None for a set without one.
    name: the set's name; empty in records of runs before sets were named.
    settings: of a set that is no ball, the first 16 digits of a SHA-256 of what it was made with.
    """

    norm: Norm | None = None
    epsilon: float | None = None
    name: str = ""
    settings: str = ""

    @classmethod
    def of(cls, constraint: Constraint) -> Threat:
        """The record of a set."""
        radius = getattr(constraint, "radius", None)
        epsilon = None if radius is None or not math.isfinite(radius) else float(radius)
        norm, name = norm_of(constraint), set_name(constraint)
        if norm is not None:
            return cls(norm, epsilon, name)
        content = type(constraint).__qualname__.encode() + _content(_settings(constraint))
        return cls(None, epsilon, name, hashlib.sha256(content).hexdigest()[:16])

    @classmethod
    def read(cls, record: Any) -> Threat | None:
        """The threat of a file's record, which has only norm and epsilon in older files; None if there is none."""
        if not isinstance(record, Mapping):
            return None
        texts = [record.get(name) for name in ("norm", "name", "settings")]
        norm, name, settings = (value if isinstance(value, str) else "" for value in texts)
        epsilon = record.get("epsilon")
        known = isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool) and math.isfinite(epsilon)
        size = float(epsilon) if epsilon is not None and known else None
        return cls(norm or None, size, name, settings) if norm or name or known else None

    def asdict(self) -> dict[str, Any]:
        """A dictionary for JSON; ``settings`` only if not empty."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "settings" or value}

    @property
    def is_ball(self) -> bool:
        """Whether norm and radius define the set; a record without a name is of a ball."""
        return self.norm is not None or not self.name

    @property
    def key(self) -> tuple[str, float | None, str]:
        """A key that is equal for two threats if they are the same set."""
        if self.is_ball:
            return self.norm or "linf", None if self.epsilon is None else round(self.epsilon, 9), ""
        return "", None, f"{self.name} {self.settings}"

    def __str__(self) -> str:
        """``ℓ∞, ε = 8/255``, or the set's name."""
        if not self.is_ball:
            return self.name
        size = "ε not on record" if self.epsilon is None else f"ε = {radius_text(self.epsilon)}"
        return size if self.norm is None else f"{_SIGNS.get(self.norm, self.norm)}, {size}"

    @property
    def at(self) -> str:
        """The threat in words after an attack or accuracy: ``at ε = 8/255 in ℓ∞``, ``in Diamond(size=0.3)``."""
        if not self.is_ball:
            return f"in {self.name}"
        size = "an ε that is not on record" if self.epsilon is None else f"ε = {radius_text(self.epsilon)}"
        return f"at {size}" if self.norm is None else f"at {size} in {_SIGNS.get(self.norm, self.norm)}"


def can_sample(constraint: Constraint) -> bool:
    """Whether the set defines :meth:`Constraint.sample`."""
    return getattr(constraint.sample, "__func__", None) is not Constraint.sample


def _projected(constraint: Constraint, x: Tensor) -> Tensor:
    """Points of the set far from 0, ``[B, ...]``: large normal draws, projected. The same for the same x."""
    generator = torch.Generator(x.device).manual_seed(0)
    draw = FAR * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return constraint.project(draw, x)


@torch.no_grad()
def measured_reach(constraint: Constraint, x: Tensor, direction: str) -> float:
    """Measure the size of a constraint without ``radius`` or ``reach``, in the norm of the steps.

    The median over the first eight examples of the length of a large random perturbation, projected: ‖·‖_∞ for the
    direction "sign", ‖·‖₂ otherwise. 1 where the set is a point, from which no step leads away.
    """
    points = _projected(constraint, x[:SEEN]).flatten(1)
    lengths = points.abs().amax(1) if direction == "sign" else points.norm(dim=1)
    return lengths.median().item() or 1.0


@torch.no_grad()
def check_set(constraint: Constraint, x: Tensor) -> None:
    """Check that ``project`` gives perturbations of x, and does not move points of the set.

    Attacked images outside the set do not count as broken: a projection that is not exact would make a network look
    robust. Raises :class:`InputError`, also for images outside its range.
    """
    few = x[:SEEN]
    constraint.check(few)
    points, name = _projected(constraint, few), set_name(constraint)
    shape = tuple(points.shape) if isinstance(points, Tensor) else type(points).__name__
    if shape != tuple(few.shape):
        raise InputError(f"{name}: project(delta, x) gives {shape} for {tuple(few.shape)}; it must keep the shape")
    if not points.isfinite().all():
        raise InputError(f"{name}: project(delta, x) gives values that are not finite")
    moved = (constraint.project(points, few) - points).abs().max().item()
    if not moved <= SAME_POINT:
        raise InputError(
            f"{name}: project(delta, x) moves a point that it has projected by {moved:.2g}; it must leave it where it "
            f"is, to within {SAME_POINT:g}"
        )
