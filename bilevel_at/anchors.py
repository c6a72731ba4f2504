"""Anchor policies: where z, the point a lower level is linearised around or pulled towards, comes from.

A policy is a small object with one method, ``draw(lower, model, batch, generator) -> z [B, ...]``. The ones that
remember have a state that outlives the batch. Names stand for the policies that need no argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .batch import Batch
from .directions import Direction, direction_of
from .errors import InputError
from .memory import SampleMemory
from .steps import positive, whole_number

if TYPE_CHECKING:
    from .problem import LowerProblem

__all__ = ["Anchor", "Corner", "Gaussian", "Remembered", "Steps", "Uniform", "Zero", "anchor_policy"]

AnchorName = Literal["zero", "uniform", "corner", "sign-step", "gradient-step", "remembered"]


class Anchor:
    """Base class of the policies. Stateless ones need only :meth:`draw`."""

    def draw(self, lower: LowerProblem, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """z ``[B, ...]``, detached and in C(x)."""
        raise NotImplementedError(f"{type(self).__name__} does not define draw(lower, model, batch, generator)")

    def remember(self, batch: Batch, delta: Tensor) -> None:
        """Called with δ* after each solve whose anchor this policy drew."""

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called at the start of each epoch."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Zero(Anchor):
    """z = 0 (FGSM)."""

    def draw(self, lower: LowerProblem, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        return torch.zeros_like(batch.x)


@dataclass(frozen=True)
class Uniform(Anchor):
    """z ~ U(C(x)) (FGSM-RS; BETA, Algorithm 1)."""

    def draw(self, lower: LowerProblem, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        return lower.constraint.sample(batch.x, generator)


@dataclass(frozen=True)
class Corner(Anchor):
    """z a random corner of the ℓ∞ ball, {−ε, ε}^d cut to the input range (Fast-BAT, Table A4)."""

    def draw(self, lower: LowerProblem, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        return lower.constraint.corner(batch.x, generator)


@dataclass(frozen=True)
class Gaussian(Anchor):
    """z ~ N(0, scale² I), projected onto C(x) (TRADES and MART, whose code starts at scale 0.001)."""

    scale: float = 1e-3

    def __post_init__(self) -> None:
        positive("scale", self.scale)

    def draw(self, lower: LowerProblem, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(batch.x.shape, generator=generator, dtype=batch.x.dtype, device=batch.x.device)
        return lower.constraint.project(self.scale * noise, batch.x)


@dataclass
class Steps(Anchor):
    """z after ``count`` projected gradient steps from another anchor: z ← P_C(z − step · D(∇_δ ℓ_atk(θ, z))).

    start: the policy they begin at. direction: D, "sign", "taylor" or "normalized". step: its length, by default the
    lower problem's own 1/λ. ``Steps("uniform", "taylor")`` is Fast-BAT's anchor (Remark 2);
    ``Steps("uniform", "sign", count=K - 1)`` under a sign-linearised problem is PGD-K. count: at least 0.

    Raises :class:`InputError` for values outside these ranges, and where the lower problem has no fixed step to use.
    """

    start: Anchor | AnchorName = "uniform"
    direction: Direction | str = "taylor"
    step: float | None = None
    count: int = 1

    def __post_init__(self) -> None:
        self.start = anchor_policy(self.start)
        self.direction = direction_of(self.direction)
        if self.step is not None:
            positive("step", self.step)
        whole_number("count", self.count, 0)

    def draw(self, lower: LowerProblem, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """z ``[B, ...]`` after ``count`` steps; each is one forward and one backward pass."""
        step = lower.step_size() if self.step is None else self.step
        if step is None:
            raise InputError(f"{type(lower).__name__} has no fixed step; give the anchor its own: Steps(step=...)")
        z = anchor_policy(self.start).draw(lower, model, batch, generator)
        direction = direction_of(self.direction)
        for _ in range(self.count):
            gradient = lower.attack_gradient(model, batch, z)
            z = lower.constraint.project(z - step * direction(gradient), batch.x)
        return z

    def remember(self, batch: Batch, delta: Tensor) -> None:
        anchor_policy(self.start).remember(batch, delta)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        anchor_policy(self.start).set_epoch(epoch, epochs)

    def state_dict(self) -> dict[str, Any]:
        return anchor_policy(self.start).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        anchor_policy(self.start).load_state_dict(state)


@dataclass
class Remembered(Anchor):
    """z = the example's δ* of the last time it was seen, moved through the same crop and flip as its image.

    Perturbations live on the padded canvas of ``batch.view`` (or, without one, on the image itself), start uniform,
    and are forgotten as every ``reset_every``-th epoch begins (0: never), except the last one.
    size: keep them resized to ``size × size``, for images too many and too large to remember at full size; bilinear,
        antialiased on the way down. The view is not followed then, as in Algorithm 2.
    Raises :class:`InputError` where a batch has no index. Source: ATAS (Huang et al., 2023), Algorithms 1 and 2, and
    ATTA before it; the schedule is that of their published code.
    """

    reset_every: int = 0
    size: int | None = None
    memory: SampleMemory = field(default_factory=SampleMemory, repr=False)

    def __post_init__(self) -> None:
        whole_number("reset_every", self.reset_every, 0)
        if self.size is not None:
            whole_number("size", self.size, 1)

    def draw(self, lower: LowerProblem, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """The kept perturbations ``[B, ...]`` in the batch's view, or a uniform draw, projected onto C(x)."""
        if self.size is not None:
            small = batch.x.new_zeros((*batch.x.shape[:2], self.size, self.size))
            kept = self.memory.read(batch, lower.constraint.unbounded().sample(small, generator))
            return lower.constraint.project(_resized(kept, *batch.x.shape[2:]), batch.x)
        like = batch.x if batch.view is None else batch.view.pad(batch.x)
        canvas = self.memory.read(batch, lower.constraint.unbounded().sample(like, generator))
        if batch.view is not None:
            # Unseen canvases are kept at once: writing back one window must not lose the rest of the draw.
            self.memory.write(batch, canvas)
            canvas = batch.view.apply(canvas)
        return lower.constraint.project(canvas, batch.x)

    def remember(self, batch: Batch, delta: Tensor) -> None:
        """Write δ* back where :meth:`draw` reads it; what the view does not show stays as it is."""
        if self.size is not None:
            delta = _resized(delta, self.size, self.size)
        elif batch.view is not None:
            canvas = self.memory.read(batch, batch.view.pad(torch.zeros_like(delta)))
            delta = batch.view.write(canvas, delta)
        self.memory.write(batch, delta)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        if self.reset_every and (epoch + 1) % self.reset_every == 0 and epoch != epochs - 1:
            self.memory.clear()

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state)


def _resized(delta: Tensor, height: int, width: int) -> Tensor:
    """Perturbations ``[B, C, H, W]`` at another size; averages, so no value leaves the range of those it is made of."""
    return torch.nn.functional.interpolate(delta, (height, width), mode="bilinear", antialias=True)


_NAMED: dict[str, Callable[[], Anchor]] = {
    "zero": Zero,
    "uniform": Uniform,
    "corner": Corner,
    "sign-step": lambda: Steps("uniform", "sign"),
    "gradient-step": lambda: Steps("uniform", "taylor"),
    "remembered": Remembered,
}


def anchor_policy(anchor: Anchor | str) -> Anchor:
    """The policy itself, or the one of that name: zero, uniform, corner, sign-step, gradient-step, remembered."""
    if isinstance(anchor, Anchor):
        return anchor
    if anchor not in _NAMED:
        raise InputError(f"anchor {anchor!r} is not known; choose from {', '.join(_NAMED)}, or pass an Anchor")
    return _NAMED[anchor]()
