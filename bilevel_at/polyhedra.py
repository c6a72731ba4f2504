"""The nearest point of a polyhedron, by non-negative least squares.

    min ‖δ − u‖²  s.t.  Bδ ≤ b

With h = Bu − b, the displacement p = δ − u is the least-distance solution of −Bp ≥ h, which Lawson and Hanson
(Solving Least Squares Problems, chapter 23) reduce to NNLS in the multipliers. The active rows it finds then give
the point to rounding error by one linear solve.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from .errors import InputError

__all__ = ["nearest_points"]


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
    scale = max(1e-300, float(excess.max()))
    system = np.vstack([-B.T, excess[None] / scale])
    target = np.zeros(len(u) + 1)
    target[-1] = 1.0
    multipliers, distance = nnls(system, target, maxiter=50 * max(system.shape))
    residual = system @ multipliers - target
    if distance < 1e-9 or residual[-1] > -1e-14:
        raise InputError(f"no δ satisfies Bδ ≤ b: the polyhedron is empty (b from {b.min():g} to {b.max():g})")
    active = B[multipliers > 0]
    gap = active @ u - b[multipliers > 0]
    return u - active.T @ np.linalg.lstsq(active @ active.T, gap, rcond=None)[0]
