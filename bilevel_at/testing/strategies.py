"""Hypothesis strategies for batches, smooth models, constraints, lower levels and whole problems, in float64.

Tensors are drawn through a seed, so that examples shrink in their shape and their parameters, not value by value; they
are rounded to two decimals, and a :class:`Setting` prints all of them, so that an example can be read and typed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

from ..batch import Batch
from ..constraints import Constraint, L2Ball, LinfBall
from ..losses import Loss, cross_entropy, minus, negative_margin
from ..lower import Linearized, Proximal
from ..polyhedra import Polyhedron
from ..problem import BilevelProblem, LowerProblem, UpperProblem
from .report import DegenerateActivity, VacuousCheck

__all__ = [
    "Setting",
    "batches",
    "boxes",
    "curvature_bound",
    "l2_balls",
    "linearized",
    "polyhedra",
    "proximal",
    "rejecting",
    "settings_of",
    "shapes",
    "smooth_models",
]

FLOAT = torch.float64


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _short(values: Tensor) -> Tensor:
    """Two decimals, which are enough to be in general position; none is 0."""
    rounded = values.mul(100).round()
    return torch.where(rounded == 0, 1.0, rounded) / 100


seeds = st.integers(0, 2**31 - 1)


def shapes(max_values: int = 12) -> st.SearchStrategy[tuple[int, ...]]:
    """Input shapes: vectors, and small images ``(C, H, W)``."""
    vectors = st.integers(1, max_values).map(lambda d: (d,))
    images = st.tuples(st.integers(1, 2), st.integers(2, 3), st.integers(2, 3))
    return st.one_of(vectors, images.filter(lambda s: math.prod(s) <= max_values))


@st.composite
def batches(draw: st.DrawFn, shape: tuple[int, ...], classes: int, max_size: int = 4, indexed: bool = False) -> Batch:
    """Inputs uniform in [0, 1], labels below ``classes``; with distinct indices where ``indexed``."""
    n = draw(st.integers(1, max_size))
    g = _generator(draw(seeds))
    x = _short(0.99 * torch.rand((n, *shape), generator=g, dtype=FLOAT))  # not at either end of the input range
    y = torch.randint(0, classes, (n,), generator=g)
    index = torch.randperm(4 * n, generator=g)[:n] if indexed else None
    return Batch(x, y, index)


@st.composite
def smooth_models(draw: st.DrawFn, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Networks with tanh or softplus, in float64 and eval mode: dense ones, and a convolutional one for images."""
    activation = draw(st.sampled_from([nn.Tanh, nn.Softplus]))
    width = draw(st.integers(2, 6))
    convolutional = len(shape) == 3 and draw(st.booleans())
    scale = draw(st.floats(0.5, 2.0))
    g = _generator(draw(seeds))
    layers: list[nn.Module]
    if convolutional:
        layers = [nn.Conv2d(shape[0], width, 2), activation(), nn.Flatten()]
        features = width * (shape[1] - 1) * (shape[2] - 1)
    else:
        features = width
        layers = [nn.Flatten(), nn.Linear(math.prod(shape), width), activation()]
    model = nn.Sequential(*layers, nn.Linear(features, classes)).to(FLOAT).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(_short(scale * torch.randn(parameter.shape, generator=g, dtype=FLOAT) / math.sqrt(fan_in)))
    return model


def boxes(ranged: bool | None = None) -> st.SearchStrategy[LinfBall]:
    """ℓ∞ balls with ε in 0.02 … 0.6, with the input range [0, 1] or without (``ranged`` fixes which)."""
    bounds = {None: st.sampled_from([(0.0, 1.0), None]), True: st.just((0.0, 1.0)), False: st.none()}[ranged]
    return st.builds(LinfBall, st.floats(0.02, 0.6), bounds)


def l2_balls() -> st.SearchStrategy[L2Ball]:
    """ℓ2 balls with ε in 0.05 … 1, with the input range [0, 1] or without."""
    return st.builds(L2Ball, st.floats(0.05, 1.0), st.sampled_from([(0.0, 1.0), None]))


@st.composite
def polyhedra(draw: st.DrawFn, shape: tuple[int, ...], ranged: bool | None = None) -> Polyhedron:
    """Bδ ≤ b with 1 … 6 random rows and b > 0, so that δ = 0 is inside."""
    d = math.prod(shape)
    m = draw(st.integers(1, 6))
    g = _generator(draw(seeds))
    B = _short(torch.randn((m, d), generator=g, dtype=FLOAT))
    b = _short((0.02 + 0.4 * torch.rand(m, generator=g, dtype=FLOAT)) * B.norm(dim=1))
    bounds = draw(st.sampled_from([(0.0, 1.0), None])) if ranged is None else ((0.0, 1.0) if ranged else None)
    return Polyhedron(B, b, bounds)


def attack_losses() -> st.SearchStrategy[Loss]:
    """Minus the cross-entropy, and minus the negative margin (smooth away from ties of the best class)."""
    return st.sampled_from([minus(cross_entropy), minus(negative_margin)])


def linearized(
    constraint: Constraint, model: nn.Module | None = None, direction: str = "taylor"
) -> st.SearchStrategy[Linearized]:
    """Closed-form lower levels at 1/λ in 0.05 … 2 with zero, uniform and one-step anchors."""
    return st.builds(
        Linearized,
        attack_losses(),
        st.just(constraint),
        anchor=st.sampled_from(["zero", "uniform", "gradient-step", "sign-step"]),
        direction=st.just(direction),
        step=st.floats(0.05, 2.0),
    )


def curvature_bound(model: nn.Module) -> float:
    """1 + ½ ∏‖W‖² over the layers, about the largest curvature of the cross-entropy in the input."""
    norms = [p.flatten(1).norm().item() for p in model.parameters() if p.ndim > 1]
    return 1 + 0.5 * math.prod(norms) ** 2


def proximal(constraint: Constraint, model: nn.Module, tol: float = 1e-13) -> st.SearchStrategy[Proximal]:
    """Proximal lower levels with λ in 1 … 3 times :func:`curvature_bound`, so that g is strongly convex."""
    bound = curvature_bound(model)
    return st.builds(
        Proximal,
        st.just(minus(cross_entropy)),
        st.just(constraint),
        lam=st.floats(1.0, 3.0).map(lambda factor: factor * bound),
        anchor=st.sampled_from(["zero", "uniform"]),
        tol=st.just(tol),
    )


def _weights(layer: nn.Module) -> str:
    return "".join(f", {name}={p.tolist()}" for name, p in layer.named_parameters())


@contextmanager
def rejecting() -> Iterator[None]:
    """Discard an example at which there is nothing to check, as :func:`hypothesis.assume` does.

    That is one where a constraint is about to become active or inactive (:class:`DegenerateActivity`), or whose
    implicit term is too small for an error to show (:class:`VacuousCheck`). Everything else is raised.
    """
    try:
        yield
    except (DegenerateActivity, VacuousCheck):
        reject()


@dataclass(repr=False)
class Setting:
    """One example for a property: a problem, a model, a batch and an anchor."""

    problem: BilevelProblem
    model: nn.Module
    batch: Batch
    anchor: Tensor

    def __repr__(self) -> str:
        layers = [f"{layer}{_weights(layer)}" for layer in self.model.children()]
        target = "" if self.batch.y is None else f", y={self.batch.y.tolist()}"
        lines = [
            f"problem={self.problem!r}",
            *(f"model[{i}]={layer}" for i, layer in enumerate(layers)),
            f"x={self.batch.x.tolist()}{target}",
            f"anchor={self.anchor.tolist()}",
        ]
        return "Setting(\n    " + ",\n    ".join(lines) + "\n)"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints a dataclass field by field otherwise."""
        printer.text(repr(self))


@st.composite
def settings_of(
    draw: st.DrawFn,
    lower: Callable[[Any, nn.Module], st.SearchStrategy[LowerProblem]],
    constraint: Callable[[tuple[int, ...]], st.SearchStrategy[Constraint]],
    max_values: int = 12,
    max_size: int = 4,
) -> Setting:
    """A :class:`Setting`; ``lower(constraint, model)`` and ``constraint(shape)`` return strategies."""
    shape = draw(shapes(max_values))
    classes = draw(st.integers(2, 4))
    model = draw(smooth_models(shape, classes))
    batch = draw(batches(shape, classes, max_size))
    problem_lower = draw(lower(draw(constraint(shape)), model))
    generator = _generator(draw(seeds))
    anchor = problem_lower.solve(model, batch, generator=generator).anchor
    return Setting(BilevelProblem(UpperProblem(), problem_lower), model, batch, anchor)
