"""The nearest points of a polyhedron for a whole batch at once, on its own device, in float64.

    min ‖δ − u‖²  s.t.  Bδ ≤ b_i,  low_i ≤ δ ≤ high_i

A bound costs nothing but a clip: with multipliers y ≥ 0 of the rows alone, the point is δ(y) = clip(u − Bᵀy, low, high),
and y is right where min(y, b − Bδ(y)) = 0. Two methods find it, each for all samples together:

1. Newton's on that equation, which is piecewise linear: it solves for the rows that seem active, on the coordinates
   that seem free, until both sets stay (the primal-dual active set method: Hintermüller, Ito and Kunisch, The
   primal-dual active set strategy as a semismooth Newton method, SIAM J. Optim. 13, 2002). Each round is a batch of
   m × m systems. It may cycle where many bounds or more than d rows are active.
2. For the samples left, a primal-dual interior point method (Mehrotra's predictor and corrector; Nocedal and Wright,
   Numerical Optimization, section 16.6), which does not; its multipliers start Newton's method again.

A sample is done where its y ≥ 0, no row is exceeded and every row with a multiplier is met, all to rounding: then δ(y)
is the nearest point, whatever led there. What is left after both goes to :func:`~bilevel_at.nnls.nearest_one_by_one`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .nnls import nearest_one_by_one

__all__ = ["nearest_points"]

NEWTON, INTERIOR, FINISH = ((3, 5), (4, 6)), 30, 4
TRIALS, SHRINK, NOISE = 6, 0.35, 1e-15
RIDGE = 1e-12
ENTRIES = 2**24
"""Numbers in one block of work, 128 MiB: larger batches are split."""


@dataclass(frozen=True)
class _Task:
    """Samples that are projected together, all in float64: ``u [N, d]``, ``B [m, d]``, ``b [N, m]``, and the box."""

    u: Tensor
    B: Tensor
    b: Tensor
    low: Tensor | None
    high: Tensor | None

    def of(self, samples: Tensor | slice) -> _Task:
        low, high = (side if side is None else side[samples] for side in (self.low, self.high))
        return _Task(self.u[samples], self.B, self.b[samples], low, high)

    def clip(self, point: Tensor) -> Tensor:
        return point if self.low is None else torch.clamp(point, self.low, self.high)

    @cached_property
    def products(self) -> Tensor:
        return self.B @ self.B.mT

    def gram(self, weights: Tensor | None) -> Tensor:
        """B diag(weights) Bᵀ: ``[N, m, m]``, or ``[m, m]`` without weights."""
        return self.products if weights is None else (self.B * weights[:, None]) @ self.B.mT

    @cached_property
    def rounding(self) -> Tensor:
        """What rounding makes of an excess Bu − b, ``[N, m]``."""
        return 4 * torch.finfo(torch.float64).eps * (self.u.abs() @ self.B.abs().mT + self.b.abs())

    def outside(self) -> Tensor:
        """Which samples are to be moved, ``[N]``: rounding on the boundary is no excess, so projected points stay."""
        out = (self.u @ self.B.mT - self.b > self.rounding).any(1)
        for side, sign in ((self.low, -1), (self.high, 1)):
            if side is not None:
                slop = 4 * torch.finfo(torch.float64).eps * (self.u.abs() + side.abs())
                out = out | (sign * (self.u - side) > slop).any(1)
        return out


@torch.no_grad()
def nearest_points(
    u: Tensor, B: Tensor, b: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """argmin ‖δ − u_i‖ over Bδ ≤ b_i and low_i ≤ δ ≤ high_i, for every row of u, detached.

    Nothing moves that is inside to rounding. On a CPU the rounds end when all samples are done. Elsewhere their number is
    fixed, and the host waits for the device twice at most, after each of the two methods; and for the samples that both
    leave unsolved, which are copied to the CPU.

    Args:
        u: ``[N, d]``; the result has its dtype and device.
        B: ``[m, d]``, rows of about unit length.
        b: ``[N, m]``.
        low: ``[N, d]``, or None for no box.
        high: ``[N, d]``, above ``low``.

    Raises:
        InputError: where no δ satisfies all of it.
        ConvergenceError: where the reference does not find the point either.
    """
    count = max(1, ENTRIES // (len(B) * max(B.shape)))
    whole = _Task(
        u.detach().double(),
        B.detach().double(),
        b.detach().double(),
        None if low is None else low.detach().double(),
        None if high is None else high.detach().double(),
    )
    parts = [_nearest(whole.of(slice(i, i + count))) for i in range(0, len(u), count)]
    return torch.cat(parts).to(u.dtype) if parts else u.detach().clone()


def _nearest(task: _Task) -> Tensor:
    outside = task.outside()
    if not outside.is_cuda and not outside.any():
        return task.u
    points = task.u.clone()
    left = outside.nonzero().squeeze(1)
    y = torch.zeros_like(task.b)[left]
    for rounds in NEWTON[task.low is not None]:
        if len(left):
            points[left], done, y = newton(task.of(left), y, rounds, task.low is not None)
            left, y = left[~done], y[~done]
    if len(left):
        rest = task.of(left)
        points[left], done, _ = newton(rest, interior(rest, INTERIOR), FINISH, False)
        left = left[~done]
    if len(left):
        points[left] = _reference(task.of(left))
    return points


def newton(task: _Task, y: Tensor, rounds: int, damped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Newton steps on min(y, b − Bδ(y)) = 0 from ``y [N, m]``: (δ(y), whether it is the nearest point ``[N]``, y)."""
    weight, slop = task.B.square().sum(1), 16 * task.rounding
    ridge = torch.full_like(y[:, :1], RIDGE)
    for left in range(rounds, -1, -1):
        unclipped = task.u - y @ task.B
        point = task.clip(unclipped)
        excess = point @ task.B.mT - task.b
        done = ((y >= 0) & (excess <= slop) & ((y == 0) | (excess >= -slop))).all(1)
        if not left or not y.is_cuda and done.all():
            break
        active = (y > 0) | (excess > 0) if damped else y * weight + excess > 0
        on = active.to(y.dtype)
        gram = task.gram(None if task.low is None else (point == unclipped).to(y.dtype))
        # The active rows are to be met once the others' multipliers are 0; those get a row of the unit matrix.
        right = excess * on
        if not damped:
            right = right + on * (gram @ (y * (1 - on))[..., None]).squeeze(-1)
        system = gram * (on[:, :, None] * on[:, None])
        system.diagonal(dim1=1, dim2=2).add_(1 - on + ridge)
        factor = torch.linalg.cholesky_ex(system)[0]
        step = torch.cholesky_solve(right[..., None], factor).squeeze(-1)
        if damped:
            y, ridge = _search(task, y, step, ridge)
        else:
            y = (y + step) * on
    return point, done, y


def _search(task: _Task, y: Tensor, step: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """The best of a few lengths of the step, by the dual's value, and the ridge of the next round."""
    lengths = SHRINK ** torch.arange(TRIALS, dtype=y.dtype, device=y.device)[:, None, None]
    trials = torch.cat([(y + lengths * step).clamp(min=0), y[None]])
    shift = trials @ task.B
    points = task.clip(task.u - shift)
    value = ((points - task.u).square() / 2 + shift * points).sum(-1) - (trials * task.b).sum(-1)
    noise = NOISE * ((trials[0] * task.b).abs().sum(-1) + (shift[0] * points[0]).abs().sum(-1))
    # The longest step among the best: values differ by rounding alone once the active set is right.
    chosen = (value >= value.amax(0) - noise).to(torch.uint8).argmax(0)
    y = trials.gather(0, chosen[None, :, None].expand(1, *y.shape)).squeeze(0)
    return y, torch.where(chosen[:, None] > 1, (10 * ridge).clamp(min=1e-3, max=1), (ridge / 1000).clamp(min=RIDGE))


def interior(task: _Task, rounds: int) -> Tensor:
    """Multipliers of the rows, positive and close to those of the nearest point, ``[N, m]``, by Mehrotra's method.

    The slacks S of all inequalities (rows, then lower, then upper bounds) and their multipliers Z stay positive while the
    products S Z are brought to 0 together. The box stands on the diagonal of the Hessian, so what is solved is m × m.
    """
    u, B, b, m = task.u, task.B, task.b, len(task.B)
    far = (u @ B.mT - b).amax(1, keepdim=True)
    delta = u
    if task.low is not None and task.high is not None:
        margin = 0.1 * (task.high - task.low)
        delta = torch.clamp(u, task.low + margin, task.high - margin)
        far = torch.maximum(far, (u - delta).abs().amax(1, keepdim=True))
    far = far.clamp(min=torch.finfo(u.dtype).tiny)

    def box(v: Tensor) -> list[Tensor]:
        return [] if task.low is None else [v, -v]

    S = torch.maximum(b - delta @ B.mT, far)
    if task.low is not None and task.high is not None:
        S = torch.cat([S, delta - task.low, task.high - delta], 1)
    Z = far.expand_as(S)
    for _ in range(rounds):
        gap = (S * Z).mean(1, keepdim=True)
        going = gap > (1e-8 * far) ** 2
        if not going.is_cuda and not going.any():
            break
        short = delta @ B.mT + S[:, :m] - b
        slope = delta - u + Z[:, :m] @ B
        ratio = Z / S
        inverse: Tensor | None = None
        if task.low is not None:
            lower, upper = Z[:, m:].chunk(2, 1)
            slope = slope + upper - lower
            inverse = 1 / (1 + sum(ratio[:, m:].chunk(2, 1)))
        system = task.gram(inverse) + torch.diag_embed(1 / ratio[:, :m] + RIDGE)
        factor = torch.linalg.cholesky_ex(system)[0]

        def direction(product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """The Newton step (dδ, dS, dZ) that takes S Z to S Z − product."""
            q = -slope
            if inverse is not None:
                at_low, at_high = (product / S)[:, m:].chunk(2, 1)
                q = (q + at_high - at_low) * inverse
            right = q @ B.mT - product[:, :m] / Z[:, :m] + short
            dy = torch.cholesky_solve(right[..., None], factor).squeeze(-1)
            d = q - (dy @ B if inverse is None else (dy @ B) * inverse)
            dS = torch.cat([-short - d @ B.mT, *box(d)], 1)
            return d, dS, torch.cat([dy, ((-product - Z * dS) / S)[:, m:]], 1)

        _, dS, dZ = direction(S * Z)
        reach = _length(S, dS, Z, dZ)
        ahead = ((S + reach * dS) * (Z + reach * dZ)).mean(1, keepdim=True)
        centred = gap * (ahead / gap) ** 3
        d, dS, dZ = direction(S * Z + dS * dZ - centred)
        reach = 0.995 * _length(S, dS, Z, dZ)
        delta = torch.where(going, delta + reach * d, delta)
        S, Z = torch.where(going, S + reach * dS, S), torch.where(going, Z + reach * dZ, Z)
    return Z[:, :m]


def _length(S: Tensor, dS: Tensor, Z: Tensor, dZ: Tensor) -> Tensor:
    """The longest step of at most 1 that keeps S and Z from falling below 0, ``[N, 1]``."""
    limits = [torch.where(d < 0, -v / d, 1).amin(1, keepdim=True) for v, d in ((S, dS), (Z, dZ))]
    return torch.minimum(*limits).clamp(max=1)


def _reference(task: _Task) -> Tensor:
    """The same one by one, with the bounds as rows."""
    if task.low is None or task.high is None:
        return nearest_one_by_one(task.u, task.B, task.b)
    eye = torch.eye(task.u.shape[1], dtype=task.u.dtype, device=task.u.device)
    return nearest_one_by_one(task.u, torch.cat([task.B, eye, -eye]), torch.cat([task.b, task.high, -task.low], 1))
