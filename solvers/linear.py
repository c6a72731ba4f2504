"""Hessians of the lower level in δ, dense per sample or as products, and conjugate gradients on free directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_at import shares
from bilevel_at.batch import Batch, CropFlip, per_sample
from bilevel_at.batch_statistics import couples
from bilevel_at.constraints import ActiveSet
from bilevel_at.errors import ConvergenceError, CurvatureError, InputError, name_samples
from bilevel_at.lockstep import anywhere, largest, places, rows_of_all
from bilevel_at.problem import CurvedPart
from bilevel_at.solution import Solution

__all__ = ["CurvatureOperator", "conjugate_gradients", "coupled_samples", "dense_hessian"]


def dense_hessian(part: CurvedPart, solution: Solution) -> Tensor:
    """∇²_δδ of ``part`` at δ* for every sample, ``[B, d, d]``, by torch.func (forward over reverse, vmapped).

    Raises :class:`InputError` where torch.func cannot take it.
    """
    batch, delta = solution.batch, solution.delta.detach()
    shape, d = delta.shape[1:], delta[0].numel()
    fields = {"y": batch.y, "index": batch.index}
    tensors = {name: value for name, value in fields.items() if value is not None}
    view = batch.view
    corners = {} if view is None else {"top": view.top, "left": view.left, "flip": view.flip}

    def one(flat: Tensor, rows: dict[str, Tensor], corner: dict[str, Tensor], z: Tensor) -> Tensor:
        single_row: dict[str, Any] = {name: value[None] for name, value in rows.items()}
        if view is not None:
            single_row["view"] = CropFlip(corner["top"][None], corner["left"][None], corner["flip"][None], view.padding)
        single = Batch(**single_row)
        return part(single, flat.reshape(1, *shape), z[None]).sum()

    def together(flat: Tensor) -> Tensor:
        return part(batch, flat.reshape(delta.shape), solution.anchor).sum()

    try:
        if len(delta) == 1:  # one δ, of one example or shared by all
            hessian = torch.func.hessian(together)(delta.flatten())[None]
        else:
            rows = {"x": batch.x, **tensors, **batch.more}
            hessian = torch.func.vmap(torch.func.hessian(one))(delta.flatten(1), rows, corners, solution.anchor)
    except (RuntimeError, ValueError) as error:  # torch.func names the operation it cannot batch
        reason = str(error).strip().splitlines()[0]
        raise InputError(f'torch.func cannot take this model\'s Hessian ({reason}); use method="cg"') from error
    return hessian.detach().reshape(len(delta), d, d)


def coupled_samples(values: Tensor, delta: Tensor) -> bool:
    """Whether a sample's value depends on another's δ (batch statistics in train mode, a mean over the batch).

    Asked by differentiating samples' values in other samples' δ, which is exactly 0 where they are independent.
    """
    if len(delta) == 1:
        return False  # a single δ is one system
    if values.ndim == 0:
        return True
    # Every two samples differ in a digit of their binary numbers: the losses of those with a 0 there are
    # differentiated in the δ of those with a 1, and the other way round.
    number = torch.arange(len(values), device=values.device)
    for digit in range((len(values) - 1).bit_length()):
        for ones in ((number >> digit) & 1 == 1, (number >> digit) & 1 == 0):
            (across,) = torch.autograd.grad(values[ones].sum(), delta, retain_graph=True)
            if bool(across[~ones].any()):
                return True
    return False


class CurvatureOperator:
    """p ↦ T(∇²part + diagonal)T p, one backward pass over a graph that is built once.

    coupled: as :func:`coupled_samples` has it, alike on all processes that share the batch. Statistics over them couple
        it without asking, whose passes are as many as a process has digits of rows: others would wait.
    """

    def __init__(
        self, part: CurvedPart, solution: Solution, diagonal: Tensor, active: ActiveSet, model: nn.Module
    ) -> None:
        self.diagonal, self.active = diagonal, active
        with torch.enable_grad():
            self.delta = solution.delta.detach().requires_grad_()
            values = part(solution.batch, self.delta, solution.anchor)
            self.coupled = couples(model) or anywhere(coupled_samples(values, self.delta))
            (self.gradient,) = torch.autograd.grad(values.sum(), self.delta, create_graph=True)

    def __call__(self, p: Tensor) -> Tensor:
        product: Tensor | None = None
        if self.gradient.requires_grad:
            (product,) = torch.autograd.grad(self.gradient, self.delta, p, retain_graph=True, allow_unused=True)
        scaled = per_sample(self.diagonal, p) * p
        return self.active.tangent(scaled if product is None else product + scaled)


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    scale: Tensor,
    tol: float | None = None,
    max_iter: int | None = None,
    coupled: bool = False,
) -> Tensor:
    """Solve A w = right, with ``right`` and every iterate in the range of T.

    Samples are separate systems that converge each on their own; ``coupled`` makes the batch one system, for models
    whose samples share statistics. Done where ‖A w − right‖ ≤ tol · ‖scale‖ (``tol=None``: eps^¾); ``scale`` is v
    before it was projected to ``right`` = T v, so that a T v of rounding errors is a zero. The residual is that of the
    recurrence, from which rounding parts the true one where A is ill-conditioned. ``max_iter=None`` is 10 d. A coupled
    batch that processes share is one system of all of them, which they solve in the same steps.

    Raises :class:`CurvatureError` where pᵀAp ≤ 0 was met, :class:`ConvergenceError` where ``tol`` was not reached.
    """
    if tol is None:
        tol = torch.finfo(right.dtype).eps ** 0.75
    size = right[0].numel() * (rows_of_all(len(right)) if coupled else 1)
    max_iter = 10 * size if max_iter is None else max_iter

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return shares.total((a * b).sum()).expand(len(a)) if coupled else (a * b).flatten(1).sum(1)

    def named(bad: list[int]) -> list[int]:
        return list(range(rows_of_all(len(right)))) if coupled else places(bad, len(right))

    # In units of ‖scale‖, so that the squares of tiny gradients do not underflow.
    highest = largest(scale.abs().amax()) if coupled else scale.abs().flatten(1).amax(1)
    unit = highest.expand(len(right)).clone()
    unit[unit == 0] = 1
    right, scale = right / per_sample(unit, right), scale / per_sample(unit, scale)

    w = torch.zeros_like(right)
    r = right.clone()
    p = r
    rr = dot(r, r)
    goal = tol**2 * dot(scale, scale)
    for _ in range(max_iter):
        running = rr > goal
        if not bool(running.any()):
            break
        Ap = operator(p)
        pAp = dot(p, Ap)
        bad = (running & ~(pAp > 0)).nonzero().flatten().tolist()
        if bad:
            where = "the batch as a whole" if coupled else name_samples(named(bad))
            raise CurvatureError(
                f"conjugate gradients met non-positive curvature on {where}: the Hessian is not positive definite on "
                "the free directions; raise λ or damping, or use HessianFreeKKT",
                named(bad),
            )
        alpha = torch.where(running, rr / torch.where(running, pAp, 1), 0)
        w = w + per_sample(alpha, w) * p
        r = r - per_sample(alpha, r) * Ap
        new = torch.where(running, dot(r, r), rr)
        beta = torch.where(running, new / torch.where(running, rr, 1), 0)
        p = r + per_sample(beta, p) * p
        rr = new
    late = (rr > goal).nonzero().flatten().tolist()
    if late:
        raise ConvergenceError(
            f"conjugate gradients did not reach tol={tol:g} in max_iter={max_iter} steps on "
            f"{name_samples(named(late))}; raise max_iter, tol or damping",
            named(late),
        )
    return w * per_sample(unit, w)
