"""Where the attacker may move: projection, sampling and the active set, for any input shape and batch size.

An active set is used in one way only: as the orthogonal projector T onto the directions in which δ* may move
without leaving the active constraints (the null space of B₀ in the Fast-BAT paper's Proposition 1), plus the
curvature that a curved boundary adds to the Hessian. Every solver is written in terms of these two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .batch import per_sample
from .errors import InputError
from .polyhedra import nearest_points

__all__ = ["ActiveSet", "Constraint", "L2Ball", "LinfBall", "Polyhedron"]


@dataclass
class ActiveSet:
    """The constraints that bind at δ*, as what they leave free.

    free: ``[B, ...]`` bool, the coordinates that no input range or ℓ∞ bound holds.
    normals: ``[B, r, d]`` orthonormal rows (zero rows allowed) of the other active constraints, or None.
    curvature: ``[B]``, the multiplier μ that a curved boundary adds to the Hessian as μI, or None.
    """

    free: Tensor
    normals: Tensor | None = None
    curvature: Tensor | None = None

    def tangent(self, v: Tensor) -> Tensor:
        """T v: the part of v along which δ* may move."""
        v = v * self.free
        if self.normals is not None:
            flat = v.flatten(1)[..., None]
            v = (flat - self.normals.mT @ (self.normals @ flat)).reshape(v.shape)
        return v

    def projector(self, dtype: torch.dtype) -> Tensor:
        """T as a matrix, ``[B, d, d]``."""
        matrix = torch.diag_embed(self.free.flatten(1).to(dtype))
        return matrix if self.normals is None else matrix - (self.normals.mT @ self.normals).to(dtype)

    def fraction_free(self) -> float:
        """The share of coordinates not held at a bound: where it is 0 the implicit term vanishes."""
        return self.free.float().mean().item()


class Constraint:
    """A closed convex set C(x) of perturbations. Subclass with at least :meth:`project` and :meth:`active`."""

    tol: float | None = None

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        """P_C(δ), the nearest point of C(x), ``[B, ...]``."""
        raise NotImplementedError(f"{type(self).__name__} does not define project(delta, x)")

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of C(x) per sample, shaped like ``x``."""
        raise NotImplementedError(f"{type(self).__name__} does not define sample(x, generator)")

    def corner(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A uniformly random vertex of C(x) per sample."""
        raise InputError(f"{type(self).__name__} has no random corner; the 'corner' anchor needs a LinfBall")

    def active(self, delta: Tensor, x: Tensor, gradient: Tensor | None = None) -> ActiveSet:
        """The constraints active at δ*; ``gradient`` is ∇_δ g there, which curved boundaries need."""
        raise NotImplementedError(f"{type(self).__name__} does not define active(delta, x, gradient)")

    def strict_complementarity(self, delta: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        """How far δ* is from degenerate activity, ``[B]``: the least slack or multiplier.

        At 0, dδ*/dθ does not exist.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define strict_complementarity")

    def attack_step(self) -> tuple[str, float]:
        """(direction of steepest descent, radius): how standard attacks move here, in steps of parts of the radius."""
        raise InputError(
            f"{type(self).__name__} does not define attack_step(); it needs one to be attacked with FGSM or PGD"
        )

    def attack_reach(self) -> float:
        """How far steps of standard attacks have to go to reach everything: the radius, in a ball."""
        return self.attack_step()[1]

    def unbounded(self) -> Constraint:
        """The same set without the input range: what perturbations of unseen pixels are drawn from."""
        return self

    def activity_tol(self, like: Tensor) -> float:
        """Within what distance of its bound a constraint counts as active: ``tol``, or 1e-7, in float64 1e-10.

        Balls and polyhedra allow for the rounding of a projected point besides.
        """
        if self.tol is not None:
            return self.tol
        return 1e-10 if like.dtype == torch.float64 else 1e-7


def _check_epsilon(epsilon: Any) -> float:
    if isinstance(epsilon, bool) or not isinstance(epsilon, Real):
        raise InputError(f"epsilon is {epsilon!r}; it must be a number such as 8/255")
    value = float(epsilon)
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"epsilon is {value:g}; it must be a finite number, at least 0 (such as 8/255)")
    return value


def _check_bounds(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    if bounds is None:
        return None
    low, high = bounds
    if not low < high:
        raise InputError(f"bounds are {bounds!r}; they must be (low, high) with low < high, or None for no input range")
    return float(low), float(high)


def _range(x: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The box low − x … high − x. Looks at the data where that is free, because outside the range it is empty."""
    low, high = bounds[0] - x, bounds[1] - x
    if not x.is_cuda and not ((low <= 0) & (high >= 0)).all():
        raise InputError(
            f"x has values from {x.min().item():g} to {x.max().item():g}; this constraint takes inputs in "
            f"[{bounds[0]:g}, {bounds[1]:g}] (normalise inside the model)"
        )
    return low, high


@dataclass(frozen=True)
class LinfBall(Constraint):
    """C(x) = {δ : ‖δ‖_∞ ≤ ε, low ≤ x + δ ≤ high}, the box max(−ε, low − x) … min(ε, high − x).

    epsilon: ε ≥ 0. bounds: the input range, (0, 1) by default, or None for none. tol: within what distance of a
    bound a coordinate is active.

    Raises :class:`InputError` where ε or bounds are out of range, and, from its methods, where x is outside the bounds
    (on a GPU the data is not looked at). Source: Fast-BAT paper, equation 10.
    """

    epsilon: float
    bounds: tuple[float, float] | None = (0.0, 1.0)
    tol: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", _check_epsilon(self.epsilon))
        object.__setattr__(self, "bounds", _check_bounds(self.bounds))

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The lower and upper bound of every coordinate of δ, each shaped like ``x``."""
        if self.bounds is None:
            high = torch.full_like(x, self.epsilon)
            return -high, high
        low, high = _range(x, self.bounds)
        return low.clamp(min=-self.epsilon), high.clamp(max=self.epsilon)

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        return torch.clamp(delta, *self.box(x))

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform in C(x)."""
        low, high = self.box(x)
        unit = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return torch.clamp(low + (high - low) * unit, low, high)

    def corner(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        low, high = self.box(x)
        return torch.where(torch.rand(x.shape, generator=generator, device=x.device) < 0.5, low, high)

    def active(self, delta: Tensor, x: Tensor, gradient: Tensor | None = None) -> ActiveSet:
        low, high = self.box(x)
        tol = self.activity_tol(delta)
        return ActiveSet((delta > low + tol) & (delta < high - tol))

    def strict_complementarity(self, delta: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        low, high = self.box(x)
        free = self.active(delta, x).free
        slack = torch.minimum(delta - low, high - delta)
        # A coordinate whose box is a point is active whatever the multiplier.
        pinned = high - low <= self.activity_tol(delta)
        return torch.where(free, slack, gradient.abs()).masked_fill(pinned, torch.inf).flatten(1).amin(1)

    def attack_step(self) -> tuple[str, float]:
        return "sign", self.epsilon

    def unbounded(self) -> LinfBall:
        return replace(self, bounds=None)


@dataclass(frozen=True)
class L2Ball(Constraint):
    """C(x) = {δ : ‖δ‖₂ ≤ ε}, and low ≤ x + δ ≤ high where ``bounds`` are given.

    epsilon: ε ≥ 0, the radius per sample. bounds: the input range, None by default.
    The intersection with a range is projected onto exactly: P_C(u) = clip(s·u) with the largest s ≤ 1 in the ball.
    The boundary is curved: where it is active with multiplier μ (∇g + μδ* = 0 off the range's bounds), the
    hypergradient sees the Hessian H + μI on the tangent space (the second-order KKT conditions; Nocedal and Wright,
    Numerical Optimization, section 12.5). Raises as :class:`LinfBall` does.
    """

    epsilon: float
    bounds: tuple[float, float] | None = None
    tol: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", _check_epsilon(self.epsilon))
        object.__setattr__(self, "bounds", _check_bounds(self.bounds))

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        u = delta.flatten(1)
        scale = self._shrink(u.norm(dim=1))
        if self.bounds is None:
            return (u * scale[:, None]).reshape(delta.shape)
        low, high = (side.flatten(1) for side in _range(x, self.bounds))
        # s and the set of clipped coordinates both only grow, so this ends after at most d rounds.
        clipped = torch.zeros_like(u, dtype=torch.bool)
        while True:
            point = torch.clamp(u * scale[:, None], low, high)
            held = clipped | (u * scale[:, None] < low) | (u * scale[:, None] > high)
            if bool((held == clipped).all()):
                return point.reshape(delta.shape)
            clipped = held
            left = (self.epsilon**2 - point.masked_fill(~clipped, 0).square().sum(1)).clamp(min=0).sqrt()
            grown = self._shrink(u.masked_fill(clipped, 0).norm(dim=1), left)
            scale = torch.maximum(scale, grown)

    def _shrink(self, norm: Tensor, radius: Tensor | float | None = None) -> Tensor:
        """min(1, radius / norm), 1 at norm 0."""
        radius = self.epsilon if radius is None else radius
        return torch.where(norm > radius, radius / norm, torch.ones_like(norm))

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform in the ball, then clipped to the input range."""
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        unit = direction / per_sample(direction.flatten(1).norm(dim=1), direction)
        radius = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device) ** (1 / x[0].numel())
        delta = self.epsilon * per_sample(radius, x) * unit
        if self.bounds is None:
            return delta
        return torch.clamp(delta, *_range(x, self.bounds))

    def _parts(self, delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(free coordinates, whether the sphere is active ``[B]``, its normal on the free coordinates ``[B, d]``)."""
        tol = self.activity_tol(delta)
        free = torch.ones_like(delta, dtype=torch.bool)
        if self.bounds is not None:
            low, high = _range(x, self.bounds)
            free = (delta > low + tol) & (delta < high - tol)
        # A projected point is on the sphere up to rounding, which grows with the radius.
        rounding = 32 * torch.finfo(delta.dtype).eps * self.epsilon
        on_sphere = delta.flatten(1).norm(dim=1) >= self.epsilon - max(tol, rounding)
        return free, on_sphere, (delta * free).flatten(1)

    def active(self, delta: Tensor, x: Tensor, gradient: Tensor | None = None) -> ActiveSet:
        free, on_sphere, radial = self._parts(delta, x)
        length = radial.norm(dim=1)
        has_normal = on_sphere & (length > 0)
        free = free & per_sample(~on_sphere | (length > 0), free)  # in a ball of radius 0 nothing can move
        unit = torch.where(has_normal[:, None], radial / length.clamp(min=1e-38)[:, None], 0)
        if gradient is None:
            return ActiveSet(free, unit[:, None])
        mu = self._multiplier(gradient, radial)
        return ActiveSet(free, unit[:, None], torch.where(has_normal, mu, 0).clamp(min=0))

    @staticmethod
    def _multiplier(gradient: Tensor, radial: Tensor) -> Tensor:
        """μ with ∇g + μδ = 0 on the free coordinates, ``[B]``; meaningful where the sphere is active."""
        return -(gradient.flatten(1) * radial).sum(1) / radial.square().sum(1).clamp(min=1e-38)

    def strict_complementarity(self, delta: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        free, on_sphere, radial = self._parts(delta, x)
        mu = torch.where(on_sphere, self._multiplier(gradient, radial), 0)
        norm = delta.flatten(1).norm(dim=1)
        least = torch.where(on_sphere, mu * self.epsilon, self.epsilon - norm)
        if self.bounds is not None:
            low, high = _range(x, self.bounds)
            multiplier = (gradient + per_sample(mu, delta) * delta).abs()
            slack = torch.minimum(delta - low, high - delta)
            least = torch.minimum(least, torch.where(free, slack, multiplier).flatten(1).amin(1))
        return least

    def attack_step(self) -> tuple[str, float]:
        return "normalized", self.epsilon

    def unbounded(self) -> L2Ball:
        return replace(self, bounds=None)


@dataclass(frozen=True, eq=False)
class Polyhedron(Constraint):
    """C(x) = {δ : Bδ ≤ b}, and low ≤ x + δ ≤ high where ``bounds`` are given.

    B: ``[m, d]`` with d the number of values in one input; b: ``[m]``. The same rows hold for every sample; they are
    scaled to unit length, so that activity means distance. Projection solves the dual as a non-negative least squares
    problem per sample (Lawson and Hanson's least distance programming, scipy's ``nnls``), in float64 on the CPU, so it
    suits small inputs. Source: Fast-BAT paper, equation 10.

    Raises :class:`InputError` where the shapes do not agree or no row constrains anything; and, when something is
    projected onto it, where the set is empty.
    """

    B: Tensor
    b: Tensor
    bounds: tuple[float, float] | None = None
    tol: float | None = None
    _unit: tuple[Tensor, Tensor] = field(init=False, repr=False)

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
        object.__setattr__(self, "bounds", _check_bounds(self.bounds))
        B, b = self.B.detach().double(), self.b.detach().double()
        length = B.norm(dim=1)
        if (b[length == 0] < 0).any():
            raise InputError("no δ satisfies Bδ ≤ b: a row of B is zero and its b negative")
        rows = length > 0
        if not rows.any():
            raise InputError("every row of B is zero, so Bδ ≤ b constrains nothing")
        object.__setattr__(self, "_unit", (B[rows] / length[rows, None], b[rows] / length[rows]))

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All inequalities, of unit length and in float64: (``[m', d]``, right-hand sides ``[batch, m']``)."""
        flat = x.detach().flatten(1)
        if flat.shape[1] != self.B.shape[1]:
            raise InputError(f"inputs have {flat.shape[1]} values; this polyhedron's B has {self.B.shape[1]} columns")
        B, b = (part.to(x.device) for part in self._unit)
        b = b.expand(len(x), -1)
        if self.bounds is None:
            return B, b
        low, high = _range(flat.double(), self.bounds)
        eye = torch.eye(flat.shape[1], dtype=B.dtype, device=x.device)
        return torch.cat([B, eye, -eye]), torch.cat([b, high, -low], 1)

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        B, b = self.rows(x)
        return nearest_points(delta.flatten(1), B, b).reshape(delta.shape)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The projection of a normal draw with the scale of the faces' distances: a random point, not a uniform one."""
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        scale = self._unit[1].abs().mean().item() or 1.0  # a cone has no scale of its own
        return self.project(scale * noise, x)

    def _active_rows(self, delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows with inactive ones zeroed ``[batch, m', d]``, activity ``[batch, m']``, slack ``[batch, m']``)."""
        B, b = self.rows(x)
        flat = delta.detach().double().flatten(1)
        slack = b - flat @ B.mT
        # A projected point is on its faces up to the rounding of δ to its own dtype.
        rounding = 16 * torch.finfo(delta.dtype).eps * (b.abs() + flat.norm(dim=1, keepdim=True))
        on = slack <= rounding.clamp(min=self.activity_tol(delta))
        return B * on[..., None], on, slack

    def active(self, delta: Tensor, x: Tensor, gradient: Tensor | None = None) -> ActiveSet:
        rows, _, _ = self._active_rows(delta, x)
        _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
        # Rows that are multiples of each other are so only up to the precision they were given in.
        cut = max(rows.shape[1:]) * torch.finfo(self.B.dtype).eps * singular.amax(1, keepdim=True)
        normals = (basis * (singular > cut)[..., None]).to(delta.dtype)
        return ActiveSet(torch.ones_like(delta, dtype=torch.bool), normals)

    def strict_complementarity(self, delta: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        rows, on, slack = self._active_rows(delta, x)
        multipliers = (torch.linalg.pinv(rows.mT) @ -gradient.double().flatten(1)[..., None]).squeeze(-1)
        return torch.where(on, multipliers, slack).amin(1).to(delta.dtype)

    def attack_step(self) -> tuple[str, float]:
        """The gradient's direction, and the distance from 0 to the farthest face."""
        radius = self._unit[1].amax().item()
        if radius <= 0:
            raise InputError("every b of this polyhedron is at most 0, so it has no scale for FGSM or PGD to step by")
        return "normalized", radius

    def attack_reach(self) -> float:
        """√d times the distance of the farthest face, at which a box has its corners."""
        return math.sqrt(self.B.shape[1]) * self.attack_step()[1]

    def unbounded(self) -> Polyhedron:
        return Polyhedron(self.B, self.b, None, self.tol)
