"""Anchor policies: where z comes from, the point that a lower level is linearised around or pulled towards.

An anchor has one method that computes, :meth:`Anchor.draw`, and may remember in ``observe``. Names stand for the
anchors that need no argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .batch import Batch, per_sample
from .constraints import Box, Constraint
from .directions import Direction, direction_of
from .draws import rand, randn
from .errors import InputError, at_least, positive, whole_number
from .losses import AnyLoss, input_gradient
from .memory import SampleMemory
from .policy import Number, Policy, checked, number
from .solution import Hypergradient
from .steps import Step, step_policy

__all__ = ["Anchor", "Corner", "Gaussian", "Remembered", "Start", "Steps", "Uniform", "Zero", "anchor_policy"]

Generator = torch.Generator | None


class Attacker(Protocol):
    """What an anchor reads of the lower problem that it serves."""

    @property
    def constraint(self) -> Constraint: ...
    @property
    def attack_loss(self) -> AnyLoss: ...
    def base(self, model: nn.Module, batch: Batch) -> Tensor: ...


class Anchor(Policy):
    """Base class of the anchors."""

    def draw(self, lower: Attacker, model: nn.Module, batch: Batch, generator: Generator) -> tuple[Tensor, Any]:
        """z for each row of the batch, and a memo.

        Args:
            lower: the lower problem: its constraint, attack loss and base.
            model: the network, in the mode of attack passes.
            batch: the batch, as the attack loss prepared it.
            generator: for whatever is drawn at random.

        Returns:
            (z ``[B, ...]``, whatever :meth:`observe` wants to see again as ``step.solution.memo``).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define draw(lower, model, batch, generator)")


class Start(Anchor):
    """Base class of the anchors that look at nothing but the set, so that a memory can fill itself with them."""

    def fresh(self, constraint: Constraint, base: Tensor, generator: Generator) -> Tensor:
        """z, shaped like ``base``, which δ is added to."""
        raise NotImplementedError(f"{type(self).__name__} does not define fresh(constraint, base, generator)")

    def draw(self, lower: Attacker, model: nn.Module, batch: Batch, generator: Generator) -> tuple[Tensor, Any]:
        return self.fresh(lower.constraint, lower.base(model, batch), generator), None


@dataclass(frozen=True, eq=False)
class Zero(Start):
    """z = 0 (FGSM)."""

    def fresh(self, constraint: Constraint, base: Tensor, generator: Generator) -> Tensor:
        return torch.zeros_like(base)


@dataclass(frozen=True, eq=False)
class Uniform(Start):
    """z uniform in C(x); with a radius r, uniform in the cube [−r, r]^d and then clipped to the input range.

    The two differ where a value is within r of a bound: clipping leaves mass on the bound. Published code draws in the
    cube (Wong et al., 2020); BETA (Algorithm 1) in C.

    Args:
        radius: r ≥ 0, a number or a :class:`~bilevel_at.Schedule`; by default the draw is from the constraint.
        clip: whether x + z is clipped to the constraint's ``bounds``, where it has any.
    """

    radius: Number | None = None
    clip: bool = True

    def __post_init__(self) -> None:
        if self.radius is not None:
            checked(at_least, "radius", self.radius)

    def fresh(self, constraint: Constraint, base: Tensor, generator: Generator) -> Tensor:
        if self.radius is None:
            return constraint.sample(base, generator)
        unit = rand(base.shape, generator, dtype=base.dtype, device=base.device)
        return _clipped((2 * unit - 1) * number(self.radius), constraint, base, self.clip)


@dataclass(frozen=True, eq=False)
class Corner(Start):
    """z a fair random corner of C(x) (Fast-BAT, Table A4); with a radius r, of the cube {−r, r}^d.

    Args:
        radius: r ≥ 0, a number or a :class:`~bilevel_at.Schedule`; by default the corners are the constraint's, which
            must be a box.
        clip: whether x + z is clipped to the constraint's ``bounds``, where a radius is given.

    Raises:
        InputError: from a draw, where the constraint is no box and no radius is given.
    """

    radius: Number | None = None
    clip: bool = True

    def __post_init__(self) -> None:
        if self.radius is not None:
            checked(at_least, "radius", self.radius)

    def fresh(self, constraint: Constraint, base: Tensor, generator: Generator) -> Tensor:
        down = rand(base.shape, generator, device=base.device) < 0.5
        if self.radius is not None:
            signs = torch.where(down, -1.0, 1.0).to(base)  # a radius here would be rounded to float32
            return _clipped(number(self.radius) * signs, constraint, base, self.clip)
        if not isinstance(constraint, Box):
            raise InputError(
                f"{type(constraint).__name__} has no random corner; give the corner anchor a radius, or use a LinfBall"
            )
        low, high = constraint.box(base)
        return torch.where(down, low, high)


@dataclass(frozen=True, eq=False)
class Gaussian(Start):
    """z ~ N(0, scale² I) (TRADES and MART, whose code starts at scale 0.001).

    Args:
        scale: the standard deviation, above 0.
        clip: whether z is projected onto C(x).
    """

    scale: float = 1e-3
    clip: bool = True

    def __post_init__(self) -> None:
        positive("scale", self.scale)

    def fresh(self, constraint: Constraint, base: Tensor, generator: Generator) -> Tensor:
        noise = randn(base.shape, generator, dtype=base.dtype, device=base.device)
        return constraint.project(self.scale * noise, base) if self.clip else self.scale * noise


def _clipped(z: Tensor, constraint: Constraint, base: Tensor, clip: bool) -> Tensor:
    """z with base + z in the constraint's input range, where it has one."""
    bounds = getattr(constraint, "bounds", None)
    if not clip or bounds is None:
        return z
    return torch.clamp(z, bounds[0] - base, bounds[1] - base)


@dataclass(eq=False)
class Steps(Anchor):
    """z after ``count`` projected gradient steps from another anchor: z ← P_C(z − step · D(∇_δ ℓ_atk(θ, z))).

    ``Steps("uniform", "taylor")`` is Fast-BAT's anchor (Remark 2); ``Steps("uniform", "sign", count=K - 1)`` under a
    sign-linearised problem is PGD-K.

    Args:
        start: the anchor they begin at, or its name.
        direction: D, "sign", "taylor" or "normalized".
        step: its length, a number or a policy; by default that of the linearised problem that the anchor is given to.
        count: how many, at least 0.

    Raises:
        InputError: for values outside these ranges, and from a draw, where there is no step to use.
    """

    start: Anchor | str = "uniform"
    direction: Direction | str = "taylor"
    step: Step | float | None = None
    count: int = 1

    def __post_init__(self) -> None:
        self.start = anchor_policy(self.start)
        self.direction = direction_of(self.direction)
        if self.step is not None:
            self.step = step_policy(self.step)
        whole_number("count", self.count, 0)

    def draw(self, lower: Attacker, model: nn.Module, batch: Batch, generator: Generator) -> tuple[Tensor, Any]:
        """z ``[B, ...]`` after ``count`` steps, each one forward and one backward pass; the memo is the start's."""
        start, direction, step = anchor_policy(self.start), direction_of(self.direction), self.step
        if step is None:
            raise InputError(f"{type(lower).__name__} has no step of its own; give the anchor one: Steps(step=...)")
        z, memo = start.draw(lower, model, batch, generator)
        base = lower.base(model, batch)
        for _ in range(self.count):
            gradient, _ = input_gradient(lower.attack_loss, model, batch, z)
            size = per_sample(step_policy(step).size(batch, gradient), z)
            z = lower.constraint.project(z - size * direction(gradient), base)
        return z, memo


@dataclass(eq=False)
class Remembered(Anchor):
    """z = δ* of the last time the example was seen, moved through the same crop and flip as its image.

    With ``view``, perturbations live on the padded canvas of ``batch.view`` (where a batch has one). They are forgotten
    as every ``reset_every``-th epoch begins, except the last. Source: ATAS (Huang et al., 2023), Algorithms 1 and 2,
    and ATTA before it; the schedule is that of their published code.

    Args:
        start: where examples begin that nothing is remembered of; drawn without the input range.
        by: "example" remembers by ``batch.index``; "position" by the place in the batch.
        view: whether what is remembered follows the crop and flip.
        clip: whether z is projected onto C(x).
        reset_every: epochs, 0 for never. :meth:`resets` may be overridden for another rule.
        size: remember them resized to ``size × size``, for images too many and too large to remember as they are;
            bilinear, antialiased on the way down. The view is not followed then, as in Algorithm 2.

    Raises:
        InputError: for values outside these ranges, and where a batch has no index.
    """

    start: Start | str = "uniform"
    by: Literal["example", "position"] = "example"
    view: bool = True
    clip: bool = True
    reset_every: int = 0
    size: int | None = None
    memory: SampleMemory = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.start = _start(self.start)
        self.memory = SampleMemory(self.by)
        whole_number("reset_every", self.reset_every, 0)
        if self.size is not None:
            whole_number("size", self.size, 1)

    def draw(self, lower: Attacker, model: nn.Module, batch: Batch, generator: Generator) -> tuple[Tensor, Any]:
        """(what is remembered ``[B, ...]``, in the batch's view, or a fresh start; the whole canvas as the memo)."""
        base = lower.base(model, batch)
        like = base
        if self.size is not None:
            like = base.new_zeros((*base.shape[:2], self.size, self.size))
        elif self._followed(batch) is not None:
            like = self._followed(batch).pad(base)
        # Drawn for every row, known or not: the draws do not depend on what is remembered.
        canvas = self.memory.read(batch, _start(self.start).fresh(lower.constraint.unbounded(), like, generator))
        z = canvas
        if self.size is not None:
            z = _resized(canvas, *base.shape[2:])
        elif self._followed(batch) is not None:
            z = self._followed(batch).apply(canvas)
        return (lower.constraint.project(z, base) if self.clip else z), canvas

    def to_remember(self, step: Hypergradient) -> Tensor:
        """What is remembered of a step, shaped like z: δ*."""
        return step.solution.delta

    def observe(self, step: Hypergradient) -> None:
        """Write back where :meth:`draw` reads; what the view does not show stays as it was."""
        batch, canvas, delta = step.solution.batch, step.solution.memo, self.to_remember(step)
        if len(canvas) != len(delta) and self._followed(batch) is not None:
            raise InputError(
                'one of several perturbations of an example was chosen (Targeted(keep="best")), and its view cannot be '
                "followed; use Remembered(view=False)"
            )
        if self.size is not None:
            delta = _resized(delta, self.size, self.size)
        elif self._followed(batch) is not None:
            delta = self._followed(batch).write(canvas, delta)
        self.memory.write(batch, delta)

    def _followed(self, batch: Batch) -> Any:
        return batch.view if self.view else None

    def resets(self, epoch: int, epochs: int) -> bool:
        """Whether everything is forgotten as epoch ``epoch`` of ``epochs`` (from 0) begins."""
        return self.reset_every > 0 and (epoch + 1) % self.reset_every == 0 and epoch != epochs - 1

    def set_epoch(self, epoch: int, epochs: int) -> None:
        if self.resets(epoch, epochs):
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


def anchor_policy(anchor: Anchor | str, step: Step | float | None = None) -> Anchor:
    """The anchor itself, or the one of that name: zero, uniform, corner, sign-step, gradient-step, remembered.

    Args:
        anchor: an anchor or a name.
        step: what steps of the anchor take that have no length of their own.

    Raises:
        InputError: for an unknown name.
    """
    if isinstance(anchor, str):
        if anchor not in _NAMED:
            raise InputError(f"anchor {anchor!r} is not known; choose from {', '.join(_NAMED)}, or pass an Anchor")
        anchor = _NAMED[anchor]()
    if isinstance(anchor, Steps) and anchor.step is None and step is not None:
        return replace(anchor, start=anchor_policy(anchor.start, step), step=step)
    return anchor


def _start(start: Start | str) -> Start:
    policy = anchor_policy(start)
    if not isinstance(policy, Start):
        raise InputError(f"a memory begins at a Start such as 'uniform' or 'zero', not {type(policy).__name__}")
    return policy
