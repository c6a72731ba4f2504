"""The nearest points of polyhedra, for all samples at once, on their own device, in float64.

    min ‖δ − u_i‖²  s.t.  Bδ ≤ b_i,  low_i ≤ δ ≤ high_i

Bounds cost no more than a clip: with multipliers y ≥ 0 of the rows, the point is δ(y) = clip(u − Bᵀy, low, high), and y
is right where min(y, b − Bδ(y)) = 0. Two methods look for it:

1. Newton's method on that equation, which is piecewise linear, so that a step is exact once the active rows and the
   free coordinates are known. Without bounds it is the primal-dual active set method (Hintermüller, Ito and Kunisch,
   The primal-dual active set strategy as a semismooth Newton method, SIAM J. Optim. 13, 2002). With bounds that one
   cycles; there it is a projected Newton method on the dual, with a few step lengths and a ridge that grows where the
   longest of them fail (Bertsekas, Projected Newton methods, SIAM J. Control Optim. 20, 1982).
2. For the samples that are left, Mehrotra's interior point method (Nocedal and Wright, Numerical Optimization, section
   16.6), whose multipliers show the active rows to Newton's method again.

Each of their rounds solves a batch of m × m systems. A sample is done where y ≥ 0, no row is exceeded, and every row
with a multiplier is met, all to rounding: these conditions make δ(y) the nearest point, whatever led to it. What both
methods leave goes to :func:`~bilevel_at.nnls.nearest_one_by_one`: degenerate samples, and sets that are empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .nnls import nearest_one_by_one

__all__ = ["nearest_points"]

PLAIN, DAMPED = (3, 5), (4, 6, 6)
"""Rounds of Newton's method, without bounds and with them, in parts: after each, finished samples are dropped."""
INTERIOR, FINISH = 30, 4
"""Rounds of the interior point method, and of Newton's method after it."""
LENGTHS, SHRINK = 6, 0.35
"""How many lengths of a damped Newton step are tried, and how each follows from the one before."""
RIDGE = 1e-13
"""Added to the diagonal of B Bᵀ, so that dependent rows share a multiplier; later rounds correct what it changes."""
ENTRIES, ON_CPU = 2**24, 2**18
"""Numbers in one block of work: larger batches are split. 128 MiB on a GPU, which is to be kept busy; on a CPU 2 MiB,
which stay in its cache and which glibc's malloc keeps, where by default it asks the kernel for new pages with every
operation (0.6 of the time with 512 samples of 64 values and 20 rows, and with 64 of 256 and 256, input range and all).
"""
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Task:
    """Samples that are projected together, in float64, with the meaning and the shapes of :func:`nearest_points`."""

    u: Tensor
    B: Tensor
    b: Tensor
    low: Tensor | None = None
    high: Tensor | None = None

    def of(self, samples: Tensor | slice) -> Task:
        low, high = (None if side is None else side[samples] for side in (self.low, self.high))
        return Task(self.u[samples], self.B, self.b[samples], low, high)

    def clip(self, point: Tensor) -> Tensor:
        return point if self.low is None else torch.clamp(point, self.low, self.high)

    @cached_property
    def products(self) -> Tensor:
        """B Bᵀ."""
        return self.B @ self.B.mT

    def weighted(self, weights: Tensor) -> Tensor:
        """B diag(weights) Bᵀ, ``[N, m, m]``; weights matter with bounds only, and are 1 without."""
        return self.products if self.low is None else (self.B * weights[:, None]) @ self.B.mT

    @cached_property
    def rounding(self) -> Tensor:
        """What rounding may make of Bu − b, ``[N, m]``."""
        return 4 * EPS * (self.u.abs() @ self.B.abs().mT + self.b.abs())

    def outside(self) -> Tensor:
        """Which samples are to be moved, ``[N]``. Rounding on a face is no excess, so that projected points stay."""
        out = (self.u @ self.B.mT - self.b > self.rounding).any(1)
        for side, sign in ((self.low, -1), (self.high, 1)):
            if side is not None:
                out = out | (sign * (self.u - side) > 4 * EPS * (self.u.abs() + side.abs())).any(1)
        return out


@torch.no_grad()
def nearest_points(u: Tensor, B: Tensor, b: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """argmin ‖δ − u_i‖ over Bδ ≤ b_i and low_i ≤ δ ≤ high_i for every sample i, ``[N, d]``; detached.

    What is inside to rounding stays as it is. On a CPU the rounds end where all samples are done. On a GPU their number
    is fixed, and the host waits for it five times at most (which samples are outside; what is left after each part of
    Newton's method and after the interior point method), besides copying what is left in the end to the CPU. On a CPU
    and with more rows than values, m > d, samples are projected one by one, which is up to five times faster there.

    Args:
        u: ``[N, d]``; the result has its dtype and device.
        B: ``[m, d]``, rows of about unit length, shared by the samples.
        b: ``[N, m]``.
        low: ``[N, d]``, or None for no bounds.
        high: ``[N, d]``, above ``low``, or None with it.

    Raises:
        InputError: where no δ satisfies all of this.
        ConvergenceError: where the one-by-one method does not find the point either.
    """
    sides = (None if side is None else side.detach().double() for side in (low, high))
    task = Task(u.detach().double(), B.detach().double(), b.detach().double(), *sides)
    solve = one_by_one if u.device.type == "cpu" and len(B) > B.shape[1] else together
    size = max(1, (ON_CPU if u.device.type == "cpu" else ENTRIES) // (len(B) * max(B.shape)))
    parts = [_outside_only(task.of(slice(i, i + size)), solve) for i in range(0, len(u), size)]
    return torch.cat(parts).to(u.dtype) if parts else u.detach().clone()


def _outside_only(task: Task, solve: Callable[[Task], Tensor]) -> Tensor:
    samples = task.outside().nonzero().squeeze(1)
    return task.u.index_copy(0, samples, solve(task.of(samples))) if len(samples) else task.u


def together(task: Task) -> Tensor:
    """The nearest points, by Newton's method, the interior point method, and one by one what is left."""
    points, left, y = task.u.clone(), torch.arange(len(task.u), device=task.u.device), torch.zeros_like(task.b)
    damped = task.low is not None
    for rounds in DAMPED if damped else PLAIN:
        points[left], done, y = newton(task.of(left), y, rounds, damped)
        going = (~done).nonzero().squeeze(1)
        left, y = left[going], y[going]
        if not len(left):
            return points
    rest = task.of(left)
    points[left], done, _ = newton(rest, interior(rest, INTERIOR), FINISH, damped=False)
    left = left[(~done).nonzero().squeeze(1)]
    if len(left):
        points[left] = one_by_one(task.of(left))
    return points


def one_by_one(task: Task) -> Tensor:
    """The nearest points by the reference, with the bounds as rows."""
    if task.low is None or task.high is None:
        return nearest_one_by_one(task.u, task.B, task.b)
    eye = torch.eye(task.u.shape[1], dtype=task.u.dtype, device=task.u.device)
    return nearest_one_by_one(task.u, torch.cat([task.B, eye, -eye]), torch.cat([task.b, task.high, -task.low], 1))


def newton(task: Task, y: Tensor, rounds: int, damped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's method from the multipliers ``y [N, m]``: (δ(y), whether it is the nearest point ``[N]``, y)."""
    weight, ridge = task.B.square().sum(1), torch.full_like(y[:, :1], RIDGE)
    for left in range(rounds, -1, -1):
        unclipped = task.u - y @ task.B
        point = task.clip(unclipped)
        excess = point @ task.B.mT - task.b
        # One step at least, and more while they may help: descents that project here go on to 16 eps.
        slop = (1 if left else 16) * task.rounding
        done = ((y >= 0) & (excess <= slop) & ((y == 0) | (excess >= -slop))).all(1)
        if not left or (y.device.type == "cpu" and left < rounds and done.all()):
            break
        active = ((y > 0) | (excess > 0) if damped else y * weight + excess > 0).to(y.dtype)
        gram = task.weighted((point == unclipped).to(y.dtype))
        # The active rows are to be met once the multipliers of the others are 0 (in the damped method, they are 0).
        others = (y * (1 - active))[..., None]
        system = gram * (active[:, :, None] * active[:, None])
        system.diagonal(dim1=1, dim2=2).add_(1 - active + ridge)
        right = ((excess + (gram @ others).squeeze(-1)) * active)[..., None]
        step = torch.cholesky_solve(right, torch.linalg.cholesky_ex(system)[0]).squeeze(-1)
        if damped:
            y, ridge = _best_length(task, y, step, ridge)
        else:
            y = (y + step) * active
    return point, done, y


def _best_length(task: Task, y: Tensor, step: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """(The y of largest dual value on the projected step, the ridge of the next round).

    The dual is ½‖δ(y) − u‖² + ⟨y, Bδ(y) − b⟩, concave, with the gradient Bδ(y) − b.
    """
    lengths = SHRINK ** torch.arange(LENGTHS, dtype=y.dtype, device=y.device)[:, None, None]
    trials = torch.cat([(y + lengths * step).clamp(min=0), y[None]])
    shift = trials @ task.B
    points = task.clip(task.u - shift)
    value = ((points - task.u).square() / 2 + shift * points).sum(-1) - (trials * task.b).sum(-1)
    noise = 4 * EPS * ((trials[0] * task.b).abs().sum(-1) + (shift[0] * points[0]).abs().sum(-1))
    # The longest of equals: once the active rows are known, values differ by rounding alone.
    chosen = (value >= value.amax(0) - noise).to(torch.uint8).argmax(0)
    y = trials.gather(0, chosen[None, :, None].expand(1, *y.shape)).squeeze(0)
    grown, shrunk = (10 * ridge).clamp(min=1e-3, max=1), (ridge / 1000).clamp(min=RIDGE)
    return y, torch.where(chosen[:, None] > 1, grown, shrunk)


class _Equations:
    """What a step of the interior point method from (δ, S, Z) solves, factored once for its two right-hand sides."""

    def __init__(self, task: Task, delta: Tensor, S: Tensor, Z: Tensor) -> None:
        self.B, self.m, self.boxed = task.B, len(task.B), task.low is not None
        self.S, self.Z, self.ratio = S, Z, Z / S
        self.short = delta @ task.B.mT + S[:, : self.m] - task.b
        slope, self.hessian = delta - task.u + Z[:, : self.m] @ task.B, torch.ones_like(delta)
        if self.boxed:
            low, high = self._sides(Z)
            slope = slope + high - low
            self.hessian = self.hessian + sum(self._sides(self.ratio))
        self.slope = slope
        system = task.weighted(1 / self.hessian) + torch.diag_embed(1 / self.ratio[:, : self.m] + RIDGE)
        self.factor = torch.linalg.cholesky_ex(system)[0]

    def _sides(self, v: Tensor) -> tuple[Tensor, Tensor]:
        low, high = v[:, self.m :].chunk(2, 1)
        return low, high

    def direction(self, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step (dδ, dS, dZ) to where, to first order, S Z is less by ``product`` and the equations hold."""
        share, right = product / self.S, -self.slope
        if self.boxed:
            low, high = self._sides(share)
            right = right + high - low
        right = right / self.hessian
        wanted = right @ self.B.mT - product[:, : self.m] / self.Z[:, : self.m] + self.short
        dy = torch.cholesky_solve(wanted[..., None], self.factor).squeeze(-1)
        move = right - (dy @ self.B) / self.hessian
        dS = -self.short - move @ self.B.mT
        if not self.boxed:
            return move, dS, dy
        dS = torch.cat([dS, move, -move], 1)
        return move, dS, torch.cat([dy, (-share - self.ratio * dS)[:, self.m :]], 1)


def interior(task: Task, rounds: int) -> Tensor:
    """Multipliers of the rows that are positive and near those of the nearest point, ``[N, m]``.

    The slacks S of all inequalities (rows, lower bounds, upper bounds) and their multipliers Z stay positive while the
    products S Z go to 0 together. Bounds only add to the diagonal of the Hessian, so that the systems stay m × m.
    """
    delta, far = task.u, (task.u @ task.B.mT - task.b).amax(1, keepdim=True)
    walls = []
    if task.low is not None and task.high is not None:
        margin = 0.1 * (task.high - task.low)
        delta = torch.clamp(task.u, task.low + margin, task.high - margin)
        far = torch.maximum(far, (task.u - delta).abs().amax(1, keepdim=True))
        walls = [delta - task.low, task.high - delta]
    far = far.clamp(min=torch.finfo(far.dtype).tiny)
    S = torch.cat([torch.maximum(task.b - delta @ task.B.mT, far), *walls], 1)
    Z = far.expand_as(S)
    for _ in range(rounds):
        gap = (S * Z).mean(1, keepdim=True)
        going = gap > (1e-8 * far) ** 2
        if going.device.type == "cpu" and not going.any():
            break
        equations = _Equations(task, delta, S, Z)
        _, dS, dZ = equations.direction(S * Z)
        length = _length(S, dS, Z, dZ)
        ahead = ((S + length * dS) * (Z + length * dZ)).mean(1, keepdim=True)
        move, dS, dZ = equations.direction(S * Z + dS * dZ - gap * (ahead / gap) ** 3)
        length = 0.995 * _length(S, dS, Z, dZ)
        delta = torch.where(going, delta + length * move, delta)
        S, Z = torch.where(going, S + length * dS, S), torch.where(going, Z + length * dZ, Z)
    return Z[:, : len(task.B)]


def _length(S: Tensor, dS: Tensor, Z: Tensor, dZ: Tensor) -> Tensor:
    """The longest step of at most 1 after which S and Z are not negative, ``[N, 1]``."""
    limits = [torch.where(step < 0, -v / step, 1).amin(1, keepdim=True) for v, step in ((S, dS), (Z, dZ))]
    return torch.minimum(*limits).clamp(max=1)
