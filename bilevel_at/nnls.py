"""The nearest point of a polyhedron by non-negative least squares: one sample after another, on the CPU.

    min ‖δ − u‖²  s.t.  Bδ ≤ b

With h = Bu − b, the displacement p = δ − u is the least-distance solution of −Bp ≥ h, which Lawson and Hanson
(Solving Least Squares Problems, chapter 23) reduce to NNLS in the multipliers. The active rows it finds then give
the point to rounding error by one linear solve, and the conditions of optimality are checked on it.

This is the reference of the batched method in ``nearest_points.py``, and what that one leaves unsolved.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .errors import ConvergenceError, InputError

__all__ = ["nearest_one_by_one"]


def nearest_one_by_one(u: Tensor, B: Tensor, b: Tensor) -> Tensor:
    """argmin_{Bδ ≤ b_i} ‖δ − u_i‖ for every row: ``u [N, d]``, ``B [m, d]``, ``b [N, m]`` -> ``[N, d]``.

    Raises:
        InputError: where no δ satisfies Bδ ≤ b.
        ConvergenceError: where neither scipy's NNLS nor our own finds the point.
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
