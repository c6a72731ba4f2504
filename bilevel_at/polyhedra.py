"""Polyhedra: linear inequalities on δ, with an input range or without. Projection itself is ``nearest_points.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .constraints import ActiveSet, Constraint, check_bounds, input_range
from .draws import randn
from .errors import InputError
from .nearest_points import nearest_points

__all__ = ["Polyhedron"]


@dataclass(frozen=True, eq=False)
class Polyhedron(Constraint):
    """C(x) = {δ : Bδ ≤ b}, and low ≤ x + δ ≤ high where ``bounds`` are given.

    The same rows constrain every sample; they are scaled to unit length, so that activity means distance. Projection
    is exact to rounding, in float64, for all samples at once on their own device
    (:func:`~bilevel_at.nearest_points.nearest_points`); its result is detached. Source: Fast-BAT paper, equation 10.

    Args:
        B: ``[m, d]`` with d the number of values in one input.
        b: ``[m]``.
        bounds: the input range, None by default.
        tol: within what distance of a face it is active.

    Raises:
        InputError: where the shapes do not agree or no row constrains anything; and, when something is projected onto
            it, where the set is empty.
    """

    B: Tensor
    b: Tensor
    bounds: tuple[float, float] | None = None
    tol: float | None = None
    radius: float | None = field(init=False, repr=False)
    reach: float | None = field(init=False, repr=False)
    _unit: tuple[Tensor, Tensor] = field(init=False, repr=False)

    steepest = "normalized"

    def __post_init__(self) -> None:
        for name in ("B", "b"):
            value = torch.as_tensor(getattr(self, name))
            object.__setattr__(self, name, value if value.is_floating_point() else value.double())
        if self.B.ndim != 2 or self.b.shape != self.B.shape[:1]:
            raise InputError(
                f"B has shape {tuple(self.B.shape)} and b {tuple(self.b.shape)}; they must be [m, d] and [m]"
            )
        if not (self.B.isfinite().all() and self.b.isfinite().all()):
            raise InputError("B and b must be finite")
        object.__setattr__(self, "bounds", check_bounds(self.bounds))
        B, b = self.B.detach().double(), self.b.detach().double()
        length = B.norm(dim=1)
        if (b[length == 0] < 0).any():
            raise InputError("no δ satisfies Bδ ≤ b: a row of B is zero and its b negative")
        rows = length > 0
        if not rows.any():
            raise InputError("every row of B is zero, so Bδ ≤ b constrains nothing")
        object.__setattr__(self, "_unit", (B[rows] / length[rows, None], b[rows] / length[rows]))
        # The distance from 0 to the farthest face; where every b is at most 0 the set has no scale.
        farthest = self._unit[1].amax().item()
        object.__setattr__(self, "radius", farthest if farthest > 0 else None)
        # A box of that radius has its corners at √d times it.
        object.__setattr__(self, "reach", math.sqrt(B.shape[1]) * farthest if farthest > 0 else None)

    def _faces(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(rows of unit length ``[m, d]``, right-hand sides ``[batch, m]``, low, high), in float64.

        low and high are the bounds of δ that the input range gives, ``[batch, d]``, or None.
        """
        flat = x.detach().flatten(1)
        if flat.shape[1] != self.B.shape[1]:
            raise InputError(f"inputs have {flat.shape[1]} values; this polyhedron's B has {self.B.shape[1]} columns")
        B, b = (part.to(x.device) for part in self._unit)
        b = b.expand(len(x), -1)
        if self.bounds is None:
            return B, b, None, None
        return B, b, *input_range(flat.double(), self.bounds)

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All inequalities, of unit length and in float64: (``[m', d]``, right-hand sides ``[batch, m']``)."""
        B, b, low, high = self._faces(x)
        if low is None or high is None:
            return B, b
        eye = torch.eye(B.shape[1], dtype=B.dtype, device=x.device)
        return torch.cat([B, eye, -eye]), torch.cat([b, high, -low], 1)

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        return nearest_points(delta.flatten(1), *self._faces(x)).reshape(delta.shape)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The projection of a normal draw with the scale of the faces' distances: a random point, not a uniform one."""
        noise = randn(x.shape, generator, dtype=x.dtype, device=x.device)
        scale = self._unit[1].abs().mean().item() or 1.0  # a cone has no scale of its own
        return self.project(scale * noise, x)

    def _on_faces(self, delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(which inequalities of :meth:`rows` are active, their slack), ``[batch, m']``."""
        B, b, low, high = self._faces(x)
        flat = delta.detach().double().flatten(1)
        slack = b - flat @ B.mT
        if low is not None and high is not None:
            slack, b = torch.cat([slack, high - flat, flat - low], 1), torch.cat([b, high, -low], 1)
        # A projected point is on its faces up to the rounding of δ to its own dtype.
        rounding = 16 * torch.finfo(delta.dtype).eps * (b.abs() + flat.norm(dim=1, keepdim=True))
        return slack <= rounding.clamp(min=self.activity_tol(delta)), slack

    def active(self, delta: Tensor, x: Tensor, gradient: Tensor | None = None) -> ActiveSet:
        on, _ = self._on_faces(delta, x)
        B, m, d = self._unit[0].to(x.device), len(self._unit[0]), self.B.shape[1]
        # The input range is a mask: as 2 d more rows it would take O(d³) operations and 2 d² numbers a sample.
        free = torch.ones_like(on[:, :1]).expand(-1, d) if self.bounds is None else ~(on[:, m : m + d] | on[:, m + d :])
        _, singular, basis = torch.linalg.svd(B * on[:, :m, None] * free[:, None], full_matrices=False)
        # Rows that are multiples of each other, or of what the mask takes, are so only up to the precision they were
        # given in. Their length is 1 before the mask.
        cut = max(m, d) * torch.finfo(self.B.dtype).eps * singular.amax(1, keepdim=True).clamp(min=1)
        normals = (basis * (singular > cut)[..., None] * free[:, None]).to(delta.dtype)
        return ActiveSet(free.reshape(delta.shape), normals)

    def strict_complementarity(self, delta: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        on, slack = self._on_faces(delta, x)
        rows = self.rows(x)[0] * on[..., None]
        multipliers = (torch.linalg.pinv(rows.mT) @ -gradient.double().flatten(1)[..., None]).squeeze(-1)
        return torch.where(on, multipliers, slack).amin(1).to(delta.dtype)

    def unbounded(self) -> Polyhedron:
        return Polyhedron(self.B, self.b, None, self.tol)
