"""The feasible sets of the problems: minimisers of quadratic functions by active sets, and the directions left free."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Everywhere", "InBall", "InBox", "InPolyhedron", "Set"]

Array = NDArray[Any]

ROUNDS = 100
"""Changes of the active set allowed; the problems here take fewer than 20."""


class Set:
    """C, and what a quadratic function's minimiser over it is."""

    def minimiser(self, A: Array, b: Array) -> Array:
        """argmin_{δ ∈ C} ½δᵀAδ − bᵀδ."""
        raise NotImplementedError

    def tangent(self, delta: Array, gradient: Array) -> tuple[Array, float]:
        """(a basis of the directions free at δ*, as columns; μ, what a curved boundary adds to the Hessian).

        Args:
            delta: δ*.
            gradient: ∇_δ g there.
        """
        raise NotImplementedError


class Everywhere(Set):
    """All of space."""

    def minimiser(self, A: Array, b: Array) -> Array:
        return np.linalg.solve(A, b)

    def tangent(self, delta: Array, gradient: Array) -> tuple[Array, float]:
        return np.eye(len(delta)), 0.0


class InPolyhedron(Set):
    """Gδ ≤ h, with the same h > 0 in every row."""

    def __init__(self, G: Array, h: float) -> None:
        self.G, self.h = G, np.full(len(G), h)

    def minimiser(self, A: Array, b: Array) -> Array:
        """By the dual active set: rows are added by violation and dropped by the sign of their multiplier."""
        rows: list[int] = []
        for _ in range(ROUNDS):
            delta, multipliers = self._on(rows, A, b)
            if rows and multipliers.min() < 0:
                rows.pop(int(multipliers.argmin()))
                continue
            excess = self.G @ delta - self.h
            excess[rows] = -np.inf
            if excess.max() <= 1e-12:
                return delta
            rows.append(int(excess.argmax()))
        raise RuntimeError("the active set of a conformance problem was not found")

    def _on(self, rows: list[int], A: Array, b: Array) -> tuple[Array, Array]:
        """The minimiser on the faces ``rows``, and their multipliers."""
        N, n = self.G[rows], len(b)
        system = np.block([[A, N.T], [N, np.zeros((len(rows), len(rows)))]])
        both = np.linalg.solve(system, np.concatenate([b, self.h[rows]]))
        return both[:n], both[n:]

    def tangent(self, delta: Array, gradient: Array) -> tuple[Array, float]:
        active = self.G[np.abs(self.G @ delta - self.h) < 1e-9]
        if not len(active):
            return np.eye(len(delta)), 0.0
        _, _, right = np.linalg.svd(active)
        return np.asarray(right[len(active) :].T), 0.0


class InBox(InPolyhedron):
    """‖δ‖_∞ ≤ radius, in ``size`` dimensions."""

    def __init__(self, radius: float, size: int) -> None:
        super().__init__(np.concatenate([np.eye(size), -np.eye(size)]), radius)
        self.radius = radius


class InBall(Set):
    """‖δ‖₂ ≤ radius."""

    def __init__(self, radius: float) -> None:
        self.radius = radius

    def minimiser(self, A: Array, b: Array) -> Array:
        """(A + μI)⁻¹ b with the μ ≥ 0 that puts it on the boundary, by bisection to the last bit."""
        values, vectors = np.linalg.eigh(A)
        turned = vectors.T @ b
        low, high = 0.0, float(np.linalg.norm(b) / self.radius)
        if np.linalg.norm(turned / values) <= self.radius:
            high = 0.0
        while low < (middle := (low + high) / 2) < high:
            if np.linalg.norm(turned / (values + middle)) > self.radius:
                low = middle
            else:
                high = middle
        return np.asarray(vectors @ (turned / (values + high)))

    def tangent(self, delta: Array, gradient: Array) -> tuple[Array, float]:
        """The directions orthogonal to δ*, and μ of ∇g + μδ* = 0."""
        if np.linalg.norm(delta) < self.radius - 1e-9:
            return np.eye(len(delta)), 0.0
        _, _, right = np.linalg.svd(delta[None])
        return np.asarray(right[1:].T), float(-gradient @ delta / (delta @ delta))
