"""Bilevel problems with one δ, whose solution and hypergradient are known in closed form.

    min_θ F(θ) = f(θ, δ*(θ))        δ*(θ) = argmin_{δ ∈ C} g(θ, δ)
    f(θ, δ) = ½‖δ − t‖² + θᵀMδ + ½‖θ‖²

f couples θ and δ, so that the hypergradient has both of its terms. The closed forms are in NumPy, by matrix
factorisations, and share no code with any solver. g and f are written once, for torch and for JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sets import Everywhere, InBall, InBox, InPolyhedron, Set

__all__ = ["Array", "Problem", "problems"]

Array = NDArray[Any]

SIZE, OUTER = 20, 8
"""The lengths of δ and of θ."""

CONDITION = 30.0
"""Largest over smallest eigenvalue of the quadratic problem's Hessian: conjugate gradients then take about SIZE
products, and a series converges by a factor of 1 − 1/30 a term."""


@dataclass(eq=False)
class Problem:
    """One problem at one θ.

    name: what tables call it.
    formula: g, in words and signs.
    theta: θ.
    arrays: the constants of f and g.
    feasible: C.
    lam: λ where ∇²_δδ g = λI, else 0.
    """

    name: str
    formula: str
    theta: Array
    arrays: Mapping[str, Array]
    feasible: Set
    lam: float = 0.0

    def lower(self, xp: Any, a: Mapping[str, Any], theta: Any, delta: Any) -> Any:
        """g(θ, δ), one number. ``xp`` is torch or jax.numpy, and ``a`` the arrays as its tensors."""
        raise NotImplementedError

    def upper(self, xp: Any, a: Mapping[str, Any], theta: Any, delta: Any) -> Any:
        """f(θ, δ), one number."""
        gap = delta - a["t"]
        return gap @ gap / 2 + theta @ (a["M"] @ delta) + theta @ theta / 2

    def solution(self, theta: Array) -> Array:
        """δ*(θ)."""
        raise NotImplementedError

    def hessian(self) -> Array:
        """∇²_δδ g at θ and δ*."""
        raise NotImplementedError

    def cross(self) -> Array:
        """∇²_δθ g at θ and δ*, ``[SIZE, p]``."""
        raise NotImplementedError

    @cached_property
    def delta(self) -> Array:
        """δ* at :attr:`theta`."""
        return self.solution(self.theta)

    def value(self, theta: Array) -> float:
        """F(θ)."""
        return float(self.upper(np, self.arrays, theta, self.solution(theta)))

    @cached_property
    def hypergradient(self) -> Array:
        """dF/dθ = ∇_θ f − (∇²_δθ g)ᵀ Z (Zᵀ(H + μI)Z)⁻¹ Zᵀ ∇_δ f, Z a basis of the directions that C leaves free."""
        a, delta = self.arrays, self.delta
        v = delta - a["t"] + a["M"].T @ self.theta
        free, multiplier = self.feasible.tangent(delta, self.residual())
        matrix = free.T @ (self.hessian() + multiplier * np.eye(len(delta))) @ free
        w = free @ np.linalg.solve(matrix, free.T @ v) if free.shape[1] else np.zeros_like(delta)
        gradient: Array = a["M"] @ delta + self.theta - self.cross().T @ w
        return gradient

    def residual(self) -> Array:
        """∇_δ g at θ and δ*: zero where C is all of space."""
        return np.zeros_like(self.delta)

    @cached_property
    def step(self) -> float:
        """α = 1/‖H‖, with which series and fixed points converge."""
        return float(1 / np.linalg.norm(self.hessian(), 2))


class Quadratic(Problem):
    """g = ½δᵀAδ − δᵀ(Bθ + c)."""

    def lower(self, xp: Any, a: Mapping[str, Any], theta: Any, delta: Any) -> Any:
        return delta @ (a["A"] @ delta) / 2 - delta @ (a["B"] @ theta + a["c"])

    def solution(self, theta: Array) -> Array:
        a = self.arrays
        return self.feasible.minimiser(a["A"], a["B"] @ theta + a["c"])

    def hessian(self) -> Array:
        return self.arrays["A"]

    def cross(self) -> Array:
        return -self.arrays["B"]

    def residual(self) -> Array:
        a = self.arrays
        gradient: Array = a["A"] @ self.delta - a["B"] @ self.theta - a["c"]
        return gradient


class Ridge(Problem):
    """g = ‖Xδ − y‖²/2n + ½ Σ exp(θ_j) δ_j²: ridge regression with a weight for every coefficient."""

    def lower(self, xp: Any, a: Mapping[str, Any], theta: Any, delta: Any) -> Any:
        gap = a["X"] @ delta - a["y"]
        return gap @ gap / (2 * len(a["y"])) + (xp.exp(theta) * delta) @ delta / 2

    def solution(self, theta: Array) -> Array:
        X, y = self.arrays["X"], self.arrays["y"]
        return np.linalg.solve(X.T @ X / len(y) + np.diag(np.exp(theta)), X.T @ y / len(y))

    def hessian(self) -> Array:
        X = self.arrays["X"]
        return np.asarray(X.T @ X / len(X) + np.diag(np.exp(self.theta)))

    def cross(self) -> Array:
        return np.diag(np.exp(self.theta) * self.delta)


class Poisson(Problem):
    """g = Σ exp(Rδ)_i − s_i (Rδ)_i with s = 1 + (Bθ)²: the likelihood of a Poisson regression; δ* = R⁻¹ log s."""

    def lower(self, xp: Any, a: Mapping[str, Any], theta: Any, delta: Any) -> Any:
        logs, rates = a["R"] @ delta, 1 + (a["B"] @ theta) ** 2
        return (xp.exp(logs) - rates * logs).sum()

    def _rates(self, theta: Array) -> Array:
        return np.asarray(1 + (self.arrays["B"] @ theta) ** 2)

    def solution(self, theta: Array) -> Array:
        return np.linalg.solve(self.arrays["R"], np.log(self._rates(theta)))

    def hessian(self) -> Array:
        R = self.arrays["R"]
        return np.asarray(R.T @ (self._rates(self.theta)[:, None] * R))

    def cross(self) -> Array:
        a = self.arrays
        return np.asarray(-a["R"].T @ ((2 * (a["B"] @ self.theta))[:, None] * a["B"]))


def problems(seed: int = 0) -> list[Problem]:
    """All problems, drawn from ``seed``."""
    draw = np.random.default_rng(seed).standard_normal
    theta = draw(OUTER)
    basis = np.linalg.qr(draw((SIZE, SIZE)))[0]
    A = basis @ np.diag(np.geomspace(1, CONDITION, SIZE)) @ basis.T
    common = {"t": draw(SIZE), "M": 0.3 * draw((OUTER, SIZE))}
    linear = {**common, "B": draw((SIZE, OUTER)), "c": draw(SIZE)}
    shape = np.linalg.qr(draw((SIZE, SIZE)))[0] * np.geomspace(1, 3, SIZE) @ np.linalg.qr(draw((SIZE, SIZE)))[0]
    regression = {**common, "M": 0.3 * draw((SIZE, SIZE)), "X": draw((40, SIZE)), "y": 5 * draw(40)}
    rows = draw((12, SIZE))
    counts = {**common, "B": linear["B"] / 2, "R": shape}
    return [
        Quadratic("quadratic", "½δᵀAδ − δᵀ(Bθ + c)", theta, {**linear, "A": A}, Everywhere()),
        Ridge("ridge", "‖Xδ − y‖²/2n + ½ Σ exp(θⱼ)δⱼ²", draw(SIZE) - 1, regression, Everywhere()),
        Poisson("Poisson", "Σ exp(Rδ) − (1 + (Bθ)²)·Rδ", theta, counts, Everywhere()),
        Quadratic("quadratic, box", "the first, ‖δ‖∞ ≤ 0.3", theta, {**linear, "A": A}, InBox(0.3, SIZE)),
        Quadratic("quadratic, ℓ2 ball", "the first, ‖δ‖₂ ≤ 1", theta, {**linear, "A": A}, InBall(1.0)),
        Quadratic("quadratic, polyhedron", "the first, Gδ ≤ h", theta, {**linear, "A": A}, InPolyhedron(rows, 0.05)),
        Quadratic("proximal, box", "λ/2 ‖δ‖² − δᵀ(Bθ + c), ‖δ‖∞ ≤ 0.3", theta,
                  {**linear, "A": 5.0 * np.eye(SIZE)}, InBox(0.3, SIZE), lam=5.0),
    ]  # fmt: skip
