"""ZeroIG's direction and the KKT solvers': how much the implicit term turns the gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..division import divided
from ..errors import InputError
from ..modes import same_buffers
from ..problem import BilevelProblem
from ..solver import Solver

__all__ = ["Coupling", "compare_solvers", "kkt_angle", "kkt_direction"]


def kkt_direction(ratio: float, cosine: float) -> float:
    """cos(d, d + i) = (1 + rc) / √(1 + 2rc + r²), from r = ‖i‖/‖d‖ ≥ 0 and c = cos(d, i) in [−1, 1].

    d = ∇_θ f is ZeroIG's gradient and i the implicit term as a KKT solver adds it; NaN where d + i = 0. r and c are
    ``implicit_ratio`` and ``implicit_cosine`` in ``metrics.jsonl``. Those are means over an epoch's steps, and this of
    the means is not the mean of this. Raises :class:`InputError` where r or c is out of range.
    """
    along, across = _parts(ratio, cosine)
    length = math.hypot(along, across)
    return along / length if length > 0 else math.nan


def kkt_angle(ratio: float, cosine: float) -> float:
    """The angle between d and d + i in degrees, 0 … 180: arctan2(r √(1 − c²), 1 + rc); see :func:`kkt_direction`.

    Not arccos of the cosine, which has no digits left where the implicit term is a millionth of the gradient.
    """
    along, across = _parts(ratio, cosine)
    return math.degrees(math.atan2(across, along)) if along or across else math.nan


def _parts(ratio: float, cosine: float) -> tuple[float, float]:
    """(d + i along d, and across it), in units of ‖d‖."""
    if not 0 <= ratio < math.inf:
        raise InputError(f"ratio is {ratio:g}; a ratio of norms is a finite number, at least 0")
    if not abs(cosine) <= 1 + 1e-6:  # a cosine computed in float32 may be a rounding beyond 1
        raise InputError(f"cosine is {cosine:g}; it must be in -1 ... 1")
    cosine = max(-1.0, min(1.0, cosine))
    return 1 + ratio * cosine, ratio * math.sqrt(1 - cosine**2)


@dataclass(frozen=True)
class Coupling:
    """One solver's hypergradient h on one batch, beside ZeroIG's d = ∇_θ f.

    norm: ‖h‖₂ over all parameters. cosine: cos(h, d), NaN where one of them is 0. ratio: ‖h − d‖/‖d‖, the
    implicit term's norm over the direct one's, NaN where d is 0.
    """

    norm: float
    cosine: float
    ratio: float


class _Direct(Solver):
    """∇_θ f alone: ZeroIG, which lives outside the core."""

    implicit = False


def compare_solvers(
    problem: BilevelProblem, model: nn.Module, batch: Batch, solvers: Mapping[str, Solver], *, seed: int = 0
) -> dict[str, Coupling]:
    """Each solver's hypergradient beside ZeroIG's, by the names in ``solvers``, all at the same θ, z and draws.

    The anchor is drawn once, by the problem's policy; what the upper loss draws is the same for every solver. The upper
    pass sees the model in the mode it is in. Works on copies: weights and batch statistics stay as they are. Several
    processes share the solvers.

    Raises what the solvers raise (:class:`CurvatureError`, :class:`ConvergenceError`).
    Source: Fast-BAT (Zhang et al., 2022), Proposition 1; the comparison is this library's.
    """
    model, problem = copy.deepcopy(model), copy.deepcopy(problem)

    def draws() -> torch.Generator:
        return torch.Generator(batch.x.device).manual_seed(seed)

    anchor = problem.lower.solve(model, batch, generator=draws()).anchor

    def at(solver: Solver) -> tuple[Tensor, float]:
        """(the gradient of every parameter in one row, float64, zero where one does not matter; the ratio)."""
        with torch.random.fork_rng(), same_buffers(model):  # no solver sees what passes of another one have moved
            torch.manual_seed(seed)  # dropout
            step = solver.hypergradient(problem, model, batch, anchor=anchor, generator=draws())
        rows = []
        for name, parameter in model.named_parameters():
            gradient = step.grads.get(name)
            rows.append(torch.zeros_like(parameter) if gradient is None else gradient)
        ratio = step.implicit_norm.double() / step.direct_norm.double()
        return torch.cat([row.detach().double().flatten() for row in rows]), ratio.item()

    direct, _ = at(_Direct())

    def coupling(solver: Solver) -> tuple[float, float, float]:
        whole, ratio = at(solver)
        norm = whole.norm()
        return norm.item(), (whole @ direct / (norm * direct.norm())).item(), ratio

    found = divided(coupling, solvers.values())
    return {name: Coupling(*numbers) for name, numbers in zip(solvers, found, strict=True)}
