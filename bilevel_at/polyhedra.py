"""Polyhedra, and the nearest point of one by non-negative least squares.

    min ‖δ − u‖²  s.t.  Bδ ≤ b

With h = Bu − b, the displacement p = δ − u is the least-distance solution of −Bp ≥ h, which Lawson and Hanson
(Solving Least Squares Problems, chapter 23) reduce to NNLS in the multipliers. The active rows it finds then give
the point to rounding error by one linear solve, and the conditions of optimality are checked on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .constraints import ActiveSet, Constraint, check_bounds, input_range
from .errors import ConvergenceError, InputError

__all__ = ["Polyhedron", "nearest_points"]


@dataclass(frozen=True, eq=False)
class Polyhedron(Constraint):
    """C(x) = {δ : Bδ ≤ b}, and low ≤ x + δ ≤ high where ``bounds`` are given.

    The same rows constrain every sample; they are scaled to unit length, so that activity means distance. Projection
    solves the dual as a non-negative least squares problem per sample (Lawson and Hanson's least distance programming,
    scipy's ``nnls``), in float64 on the CPU, so it suits small inputs. Source: Fast-BAT paper, equation 10.

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

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All inequalities, of unit length and in float64: (``[m', d]``, right-hand sides ``[batch, m']``)."""
        flat = x.detach().flatten(1)
        if flat.shape[1] != self.B.shape[1]:
            raise InputError(f"inputs have {flat.shape[1]} values; this polyhedron's B has {self.B.shape[1]} columns")
        B, b = (part.to(x.device) for part in self._unit)
        b = b.expand(len(x), -1)
        if self.bounds is None:
            return B, b
        low, high = input_range(flat.double(), self.bounds)
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

    def unbounded(self) -> Polyhedron:
        return Polyhedron(self.B, self.b, None, self.tol)


def nearest_points(u: Tensor, B: Tensor, b: Tensor) -> Tensor:
    """argmin_{Bδ ≤ b_i} ‖δ − u_i‖ for every row: ``u [N, d]``, ``B [m, d]``, ``b [N, m]`` -> ``[N, d]``.

    Raises :class:`InputError` where no δ satisfies Bδ ≤ b.
    """
    device = u.device
    out = u.detach().double().cpu().numpy().copy()
    rows, right = B.detach().double().cpu().numpy(), b.detach().double().cpu().numpy()
    excess = out @ rows.T - right
    # Rounding on the boundary is not an excess: a projected point stays where it is.
    slop = 4 * np.finfo(np.float64).eps * (np.abs(out) @ np.abs(rows).T + np.abs(right))
    for i in np.flatnonzero((excess > slop).any(1)):
        out[i] = _nearest(out[i], rows, right[i], excess[i])
    return torch.from_numpy(out).to(device=device, dtype=u.dtype)


def _nearest(u: np.ndarray, B: np.ndarray, b: np.ndarray, excess: np.ndarray) -> np.ndarray:
    scale = float(excess.max())
    system = np.vstack([-B.T, excess[None] / scale])
    target = np.zeros(len(u) + 1)
    target[-1] = 1.0
    tolerance = 1e-9 * (1 + np.abs(b) + scale)
    # scipy 1.15's nnls, the newest for Python 3.10, now and then returns something else than the solution.
    for solve in (_nnls, _lawson_hanson):
        multipliers = solve(system, target)
        rows, residual = multipliers > 0, (system @ multipliers - target)[-1]
        if not rows.any() or residual > -1e-12:
            continue
        active = B[rows]
        point: np.ndarray = u - active.T @ np.linalg.lstsq(active @ active.T, active @ u - b[rows], rcond=None)[0]
        # Feasible, and u − point in the cone of the active rows: the conditions that make it the nearest.
        outside = np.linalg.norm(u - point - B.T @ (multipliers * (scale / -residual)))
        if (B @ point - b <= tolerance).all() and outside <= 1e-6 * (1 + np.linalg.norm(u - point)):
            return point
    if np.linalg.norm(system @ multipliers - target) < 1e-7:  # Farkas: a non-negative combination says 0 ≤ −1
        raise InputError(f"no δ satisfies Bδ ≤ b: the polyhedron is empty (b from {b.min():g} to {b.max():g})")
    raise ConvergenceError(f"the projection onto a polyhedron of {len(B)} rows failed; scale B and b to similar sizes")


def _nnls(system: np.ndarray, target: np.ndarray) -> np.ndarray:
    from scipy.optimize import nnls  # a second to import, which only polyhedra need

    try:
        multipliers: np.ndarray = nnls(system, target, maxiter=50 * max(system.shape))[0]
    except RuntimeError:  # it ran out of iterations
        return np.zeros(system.shape[1])
    return multipliers


def _lawson_hanson(system: np.ndarray, target: np.ndarray) -> np.ndarray:
    """argmin_{m ≥ 0} ‖system m − target‖ by Lawson and Hanson's own active-set steps (chapter 23, algorithm NNLS)."""
    n = system.shape[1]
    best, passive, blocked = np.zeros(n), np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    small = 10 * np.finfo(np.float64).eps * np.abs(system).sum(0).max() * max(system.shape)
    for _ in range(50 * max(system.shape)):
        slope = np.where(passive | blocked, -np.inf, system.T @ (target - system @ best))
        entering = int(slope.argmax())
        if slope[entering] <= small:
            break
        passive[entering] = True
        first = True
        while True:
            trial = np.zeros(n)
            trial[passive] = np.linalg.lstsq(system[:, passive], target, rcond=None)[0]
            if first and trial[entering] <= 0:  # rounding let in a column that cannot help
                passive[entering], blocked[entering] = False, True
                break
            first = False
            leaving = passive & (trial <= 0)
            if not leaving.any():
                best, blocked = trial, np.zeros(n, dtype=bool)
                break
            share = (best[leaving] / (best[leaving] - trial[leaving])).min()
            best = best + share * (trial - best)
            passive &= best > small * 1e-3
            best[~passive] = 0
    return best
