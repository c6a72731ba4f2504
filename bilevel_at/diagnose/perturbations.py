"""How large an attack's perturbations are, coordinate by coordinate and as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..constraints import L2Ball, LinfBall
from ..errors import InputError, whole_number

__all__ = ["Perturbations", "perturbation_sizes"]

AT_BOUND = 1 - 1e-5
"""|δ| at this share of ε counts as at the bound: some roundings less, of a float32 image minus another."""


@dataclass(frozen=True)
class Perturbations:
    """The distribution of |δ| / ε over all coordinates of N perturbations, and of ‖δ‖₂.

    edges: ``[bins + 1]`` from 0 to 1; the last bin includes 1. counts: coordinates in each bin, ``[bins]`` int64.
    held: those of them that the input range holds and the bound ε does not (x + δ is at 0 or 1), ``[bins]`` int64;
        all 0 where there is no input range.
    at_bound: the share of coordinates with |δ| ≥ (1 − 1e-5) ε. at_zero: the share that is exactly 0, whether held there
        or not. at_range: the share of ``held`` among all coordinates.
    on_sphere: the share of examples with ‖δ‖₂ ≥ (1 − 1e-5) ε, for an ℓ2 ball; None for an ℓ∞ ball.
    norms: ‖δ‖₂, ``[N]``. epsilon: ε.
    """

    edges: Tensor
    counts: Tensor
    held: Tensor
    at_bound: float
    at_zero: float
    at_range: float
    on_sphere: float | None
    norms: Tensor
    epsilon: float


def perturbation_sizes(
    delta: Tensor, constraint: LinfBall | L2Ball, x: Tensor | None = None, *, bins: int = 20
) -> Perturbations:
    """A histogram of |δ_i| / ε over ``bins`` equal bins of [0, 1], with what holds the coordinates.

    Args:
        delta: perturbations ``[N, ...]`` inside ``constraint``.
        constraint: the ball.
        x: their images, of the same shape; without them, the input range is ignored. A coordinate is at the end of the
            range if x + δ is within 1e-6 of it.
        bins: the number of bins.

    Raises:
        InputError: if δ is empty, not finite or outside the ball, ε is 0, the shapes differ, or the constraint is not a
            ball.
    """
    whole_number("bins", bins, 1)
    if not isinstance(constraint, (LinfBall, L2Ball)):
        raise InputError(
            f"the constraint is a {type(constraint).__name__}; sizes are measured in an LinfBall or L2Ball"
        )
    epsilon = constraint.radius
    if epsilon == 0:
        raise InputError("epsilon is 0; there are no sizes relative to it")
    if delta.numel() == 0 or not delta.isfinite().all():
        raise InputError(f"delta of shape {tuple(delta.shape)} is empty or not finite; it is [N, ...] finite numbers")
    size, norms = delta.detach().abs().double() / epsilon, delta.detach().double().flatten(1).norm(dim=1)
    largest = size.max().item() if isinstance(constraint, LinfBall) else norms.max().item() / epsilon
    if largest > 1 + 1e-5:  # more than roundings
        raise InputError(f"delta reaches {largest:.6g} times epsilon = {epsilon:g}; perturbations lie inside the ball")
    bound = size >= AT_BOUND
    at_end = torch.zeros_like(bound)
    if x is not None and constraint.bounds is not None:
        if x.shape != delta.shape:
            raise InputError(f"x has shape {tuple(x.shape)} and delta {tuple(delta.shape)}; they must be the same")
        low, high = constraint.bounds
        moved = (x + delta).detach()
        at_end = ~bound & ((moved <= low + 1e-6) | (moved >= high - 1e-6))
    # The bin of a size, by arithmetic and not by comparison: the last bin has its right end, and roundings beyond it.
    place = (size * bins).long().clamp(max=bins - 1)
    return Perturbations(
        edges=torch.linspace(0, 1, bins + 1, dtype=torch.float64),
        counts=torch.bincount(place.flatten(), minlength=bins).cpu(),
        held=torch.bincount(place[at_end], minlength=bins).cpu(),
        at_bound=bound.double().mean().item(),
        at_zero=(size == 0).double().mean().item(),
        at_range=at_end.double().mean().item(),
        on_sphere=(norms >= AT_BOUND * epsilon).double().mean().item() if isinstance(constraint, L2Ball) else None,
        norms=norms.cpu(),
        epsilon=epsilon,
    )
