"""Where the attacker may move: projection, sampling and the active set, for any input shape and batch size.

An active set is used in one way only: as the orthogonal projector T onto the directions in which δ* may move
without leaving the active constraints (the null space of B₀ in the Fast-BAT paper's Proposition 1), plus the
curvature that a curved boundary adds to the Hessian. Every solver is written in terms of these two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .batch import on_host, per_sample
from .draws import rand, randn
from .errors import InputError, at_least
from .modes import full_precision
from .policy import Composite, Number, checked, number

__all__ = ["ActiveSet", "Constraint", "L2Ball", "LinfBall", "Range"]


@dataclass
class ActiveSet:
    """The constraints that bind at δ*, as what they leave free.

    free: ``[B, ...]`` bool, the coordinates that are at no bound of an input range or ℓ∞ ball.
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
            with full_precision(v.device):
                v = (flat - self.normals.mT @ (self.normals @ flat)).reshape(v.shape)
        return v

    def projector(self, dtype: torch.dtype) -> Tensor:
        """T as a matrix, ``[B, d, d]``."""
        matrix = torch.diag_embed(self.free.flatten(1).to(dtype))
        if self.normals is None:
            return matrix
        with full_precision(matrix.device):
            return matrix - (self.normals.mT @ self.normals).to(dtype)

    def restricted(self, matrix: Tensor) -> Tensor:
        """T A T + I − T for A ``[B, d, d]``: A on the range of T, and 1 on what is orthogonal to it.

        In O(d²) operations, and O(r d²) for r normals: products with the d × d projector take 4 d³, which was half the
        time of FullKKT's dense form on a box with d = 1024.
        """
        free = self.free.flatten(1).to(matrix.dtype)
        matrix = (matrix * free[:, :, None]).mul_(free[:, None])
        if self.normals is not None:
            normals = self.normals.to(matrix.dtype)
            with full_precision(matrix.device):
                matrix = matrix - normals.mT @ (normals @ matrix)
                matrix = matrix - (matrix @ normals.mT - normals.mT) @ normals
        matrix.diagonal(dim1=1, dim2=2).add_(1 - free)
        return matrix

    def fraction_free(self) -> float:
        """The share of coordinates that are not at a bound: where it is 0 the implicit term vanishes."""
        return self.free.float().mean().item()


class Constraint(Composite):
    """A closed convex set C(x) of perturbations of x. Subclass with at least :meth:`project`.

    ``x`` is what δ is added to, as the lower problem says (:meth:`LowerProblem.base`): the inputs, as a rule.

    :meth:`sample` serves random starts, :meth:`active` the KKT solvers. A set may also have these attributes:

    radius: ε in the set's norm, for the record and as the scale of attack steps.
    reach: the scale of attack steps, where that is not the radius.
    steepest: the direction of steepest descent in that norm, "sign" or "normalized".
    bounds: the input range (low, high) that x + δ stays in, None for none.
    tol: within what distance of its bound a constraint counts as active.
    """

    # No values here: a dataclass would take an inherited value for the default of its own field of that name.
    radius: float | None
    reach: float | None
    steepest: str
    bounds: tuple[float, float] | None
    tol: float | None

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        """P_C(δ), the nearest point of C(x), ``[B, ...]``."""
        raise NotImplementedError(f"{type(self).__name__} does not define project(delta, x)")

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of C(x) per sample, shaped like ``x``."""
        raise InputError(f"{type(self).__name__} does not define sample(x, generator), which a random start needs")

    def active(self, delta: Tensor, x: Tensor, gradient: Tensor | None = None) -> ActiveSet:
        """The constraints active at δ*; ``gradient`` is ∇_δ g there, which curved boundaries need."""
        raise InputError(
            f"{type(self).__name__} does not define active(delta, x, gradient), which this solver needs; "
            "ProjectionAdjoint needs project alone"
        )

    def strict_complementarity(self, delta: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        """How far δ* is from degenerate activity, ``[B]``: the least slack or multiplier.

        At 0, dδ*/dθ does not exist.
        """
        raise InputError(f"{type(self).__name__} does not define strict_complementarity(delta, x, gradient)")

    def check(self, x: Tensor) -> None:
        """Raise :class:`InputError` where x is outside ``bounds``, so that C(x) is empty.

        Every solve calls it once where ``x`` is on a CPU; the other methods take x as they get it.
        """
        bounds: tuple[float, float] | None = getattr(self, "bounds", None)
        if bounds is None or not x.numel():
            return
        low, high = (side.item() for side in x.aminmax())  # NaN where x has one
        if not (bounds[0] <= low and high <= bounds[1]):
            raise InputError(
                f"x has values from {low:g} to {high:g}; this constraint takes inputs in [{bounds[0]:g}, "
                f"{bounds[1]:g}] (normalise inside the model); bounds=None is for inputs without a range"
            )

    def unbounded(self) -> Constraint:
        """The same set without the input range: what perturbations of unseen pixels are drawn from."""
        return self

    def activity_tol(self, like: Tensor) -> float:
        """Within what distance of its bound a constraint counts as active: ``tol``, or 1e-7, in float64 1e-10.

        Balls and polyhedra allow for the rounding of a projected point besides.
        """
        tol: float | None = getattr(self, "tol", None)
        if tol is not None:
            return tol
        return 1e-10 if like.dtype == torch.float64 else 1e-7


def check_epsilon(name: str, epsilon: Any) -> float:
    """ε as a finite float of at least 0, or an :class:`InputError`."""
    return at_least(name, epsilon, hint=" (such as 8/255)")


def check_bounds(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    """The input range as two floats in order, or None."""
    if bounds is None:
        return None
    low, high = bounds
    if not low < high:
        raise InputError(f"bounds are {bounds!r}; they must be (low, high) with low < high, or None for no input range")
    return float(low), float(high)


def input_range(x: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The box low − x … high − x."""
    return bounds[0] - x, bounds[1] - x


class Box(Constraint):
    """A set of the form low ≤ δ ≤ high, coordinate by coordinate; a subclass says between what bounds."""

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The lower and upper bound of every coordinate of δ, each shaped like ``x``."""
        raise NotImplementedError(f"{type(self).__name__} does not define box(x)")

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        return torch.clamp(delta, *self.box(x))

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform in C(x)."""
        low, high = self.box(x)
        unit = rand(x.shape, generator, dtype=x.dtype, device=x.device)
        return torch.clamp(low + (high - low) * unit, low, high)

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


@dataclass(frozen=True)
class Range(Box):
    """C(x) = {δ : low ≤ x + δ ≤ high}: the input range alone, or with ``bounds=None`` all of space.

    Args:
        bounds: the input range, (0, 1) by default, or None for none.
        tol: within what distance of a bound a coordinate is active.

    Raises:
        InputError: where bounds are out of order, and where all of space is to be sampled.
    """

    bounds: tuple[float, float] | None = (0.0, 1.0)
    tol: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", check_bounds(self.bounds))

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.bounds is None:
            high = torch.full_like(x, torch.inf)
            return -high, high
        return input_range(x, self.bounds)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self.bounds is None:
            raise InputError("Range(None) is all of space, which has no uniform draw; give the start a radius")
        return super().sample(x, generator)

    def unbounded(self) -> Range:
        return Range(None, self.tol)


@dataclass(frozen=True)
class LinfBall(Box):
    """C(x) = {δ : ‖δ‖_∞ ≤ ε, low ≤ x + δ ≤ high}, the box max(−ε, low − x) … min(ε, high − x).

    Source: Fast-BAT paper, equation 10.

    Args:
        epsilon: ε ≥ 0, a number or a :class:`~bilevel_at.Schedule`.
        bounds: the input range, (0, 1) by default, or None for none.
        tol: within what distance of a bound a coordinate is active.

    Raises:
        InputError: where ε or bounds are out of range.
    """

    epsilon: Number
    bounds: tuple[float, float] | None = (0.0, 1.0)
    tol: float | None = None

    steepest = "sign"

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", checked(check_epsilon, "epsilon", self.epsilon))
        object.__setattr__(self, "bounds", check_bounds(self.bounds))

    @property
    def radius(self) -> float:  # type: ignore[override]  # elsewhere an attribute
        """ε now."""
        return check_epsilon("epsilon", number(self.epsilon))

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.bounds is None:
            high = torch.full_like(x, self.radius)
            return -high, high
        low, high = input_range(x, self.bounds)
        return low.clamp_(min=-self.radius), high.clamp_(max=self.radius)  # both are new

    def unbounded(self) -> LinfBall:
        return replace(self, bounds=None)


@dataclass(frozen=True)
class L2Ball(Constraint):
    """C(x) = {δ : ‖δ‖₂ ≤ ε}, and low ≤ x + δ ≤ high where ``bounds`` are given.

    The intersection with a range is projected onto exactly: P_C(u) = clip(s·u) with the largest s ≤ 1 in the ball.
    The boundary is curved: where it is active with multiplier μ (∇g + μδ* = 0 off the range's bounds), the
    hypergradient sees the Hessian H + μI on the tangent space (the second-order KKT conditions; Nocedal and Wright,
    Numerical Optimization, section 12.5).

    Args:
        epsilon: ε ≥ 0, the radius per sample, a number or a :class:`~bilevel_at.Schedule`.
        bounds: the input range, None by default.
        tol: within what distance of a bound a coordinate is active.

    Raises:
        InputError: as :class:`LinfBall` does.
    """

    epsilon: Number
    bounds: tuple[float, float] | None = None
    tol: float | None = None

    steepest = "normalized"

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", checked(check_epsilon, "epsilon", self.epsilon))
        object.__setattr__(self, "bounds", check_bounds(self.bounds))

    @property
    def radius(self) -> float:  # type: ignore[override]  # elsewhere an attribute
        """ε now."""
        return check_epsilon("epsilon", number(self.epsilon))

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        u = delta.flatten(1)
        if self.bounds is None:
            return (u * self._shrink(u.norm(dim=1))[:, None]).reshape(delta.shape)
        low, high = (side.flatten(1) for side in input_range(x, self.bounds))
        scale = self._scale_by_rounds if on_host(u) else self._scale_by_sort
        return torch.clamp(u * scale(u, low, high)[:, None], low, high).reshape(delta.shape)

    def _scale_by_rounds(self, u: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """s ``[B]``, in as many rounds as it takes: three to ten on images, where a look is free, and d at most."""
        scale = self._shrink(u.norm(dim=1))
        clipped = torch.zeros_like(u, dtype=torch.bool)
        while True:
            now = clipped | (u * scale[:, None] < low) | (u * scale[:, None] > high)
            if bool((now == clipped).all()):
                return scale
            clipped = now  # s and the set of clipped coordinates both only grow
            scale = torch.maximum(scale, self._scale(u, low, high, clipped))

    def _scale_by_sort(self, u: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The same from one sort, without a look: coordinate i is clipped where s > t_i = its bound / u_i.

        ‖clip(s·u)‖² at s = t_i grows with t_i; those where it is above ε² are not reached.
        """
        bound = torch.where(u > 0, high, low)
        reach = torch.where(u != 0, bound / u, torch.inf)
        t, order = reach.sort(dim=1)
        bound, free = bound.square().gather(1, order), u.square().gather(1, order)
        rest = free.flip(1).cumsum(1).flip(1)
        norm = bound.cumsum(1) - bound + torch.where(free > 0, t.square() * rest, torch.inf)
        reached = (norm <= self.radius**2).sum(1, keepdim=True)
        last = torch.cat([t, torch.full_like(t[:, :1], torch.inf)], 1).gather(1, reached)
        return self._scale(u, low, high, reach < last.clamp(max=1))

    def _scale(self, u: Tensor, low: Tensor, high: Tensor, clipped: Tensor) -> Tensor:
        """The s at which ‖clip(s·u)‖ = ε while just these coordinates are clipped, at most 1."""
        at_bound = torch.where(u > 0, high, low).masked_fill(~clipped, 0)
        left = (self.radius**2 - at_bound.square().sum(1)).clamp(min=0).sqrt()
        return self._shrink(u.masked_fill(clipped, 0).norm(dim=1), left)

    def _shrink(self, norm: Tensor, radius: Tensor | float | None = None) -> Tensor:
        """min(1, radius / norm), 1 at norm 0."""
        radius = self.radius if radius is None else radius
        return torch.where(norm > radius, radius / norm, torch.ones_like(norm))

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform in the ball, then clipped to the input range."""
        direction = randn(x.shape, generator, dtype=x.dtype, device=x.device)
        unit = direction / per_sample(direction.flatten(1).norm(dim=1), direction)
        radius = rand((len(x),), generator, dtype=x.dtype, device=x.device) ** (1 / x[0].numel())
        delta = self.radius * per_sample(radius, x) * unit
        if self.bounds is None:
            return delta
        return torch.clamp(delta, *input_range(x, self.bounds))

    def _parts(self, delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(free coordinates, whether the sphere is active ``[B]``, its normal on the free coordinates ``[B, d]``)."""
        tol = self.activity_tol(delta)
        free = torch.ones_like(delta, dtype=torch.bool)
        if self.bounds is not None:
            low, high = input_range(x, self.bounds)
            free = (delta > low + tol) & (delta < high - tol)
        # A projected point is on the sphere up to rounding, which grows with the radius.
        rounding = 32 * torch.finfo(delta.dtype).eps * self.radius
        on_sphere = delta.flatten(1).norm(dim=1) >= self.radius - max(tol, rounding)
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
        least = torch.where(on_sphere, mu * self.radius, self.radius - norm)
        if self.bounds is not None:
            low, high = input_range(x, self.bounds)
            multiplier = (gradient + per_sample(mu, delta) * delta).abs()
            slack = torch.minimum(delta - low, high - delta)
            least = torch.minimum(least, torch.where(free, slack, multiplier).flatten(1).amin(1))
        return least

    def unbounded(self) -> L2Ball:
        return replace(self, bounds=None)
