"""What has to hold before differences mean anything: F is a function of θ, and computing it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import policy
from ..batch import Batch
from ..modes import attack_mode
from ..problem import BilevelProblem, attack_mode_of
from .fixed import Fixed, Sources

__all__ = ["Fault", "Watched", "mean_over_samples", "pieces", "reproducible", "watching"]

ROUNDING = 1e-12
"""Relative; on a GPU sums of the same numbers differ by less between two calls."""


class Fault(Exception):
    """What is wrong, by its name among :data:`~bilevel_at.testing.CAUSES`, and in a sentence."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause, self.text = cause, text


class Watched:
    """The tensors that the caller owns: parameters, the batch, the anchor, and what ``.grad`` holds.

    Args:
        model: the network.
        batch: the examples.
        anchor: z, where there is one yet.
    """

    def __init__(self, model: nn.Module, batch: Batch, anchor: Tensor | None = None) -> None:
        of_batch = {"x": batch.x, "y": batch.y, "index": batch.index, **batch.more}
        tensors = {f"batch.{name}": value for name, value in of_batch.items()}
        tensors |= {f"parameter {name}": p.data for name, p in model.named_parameters()} | {"the anchor": anchor}
        self.model = model
        self.before = {n: (value, value.clone()) for n, value in tensors.items() if isinstance(value, Tensor)}
        self.grads = {n: (p, p.grad, _copy(p.grad)) for n, p in model.named_parameters()}

    def restore(self) -> None:
        """Give every tensor the values it had."""
        with torch.no_grad():
            for value, before in self.before.values():
                if not _same(value, before):
                    value.copy_(before)
            for parameter, grad, copy in self.grads.values():
                if grad is not None and copy is not None and not _same(grad, copy):
                    grad.copy_(copy)
                parameter.grad = grad

    def check(self, who: str) -> None:
        """Raise :class:`Fault` where one of them has changed, in which ``who`` is named."""
        for name, (value, before) in self.before.items():
            if not _same(value, before):
                raise Fault("edit in place", f"{who} changes {name} in place; work on a copy (x = x.clone())")
        for name, (parameter, grad, copy) in self.grads.items():
            if parameter.grad is not grad or (grad is not None and copy is not None and not _same(grad, copy)):
                raise Fault("fills .grad", f"{who} fills .grad of {name}; use torch.autograd.grad, not backward()")


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()


def _same(value: Tensor, copy: Tensor) -> bool:
    return torch.equal(value, copy) or bool(((value == copy) | (value.isnan() & copy.isnan())).all())


@contextmanager
def watching(watched: Watched, who: str) -> Iterator[None]:
    """Raise :class:`Fault` where what is done within changes a watched tensor; they have their values afterwards."""
    try:
        yield
        watched.check(who)
    finally:
        watched.restore()


def pieces(fixed: Fixed, watched: Watched) -> float:
    """F, with the part that changes a watched tensor named: :class:`Fault`."""
    upper, lower, model, generator = fixed.problem.upper, fixed.problem.lower, fixed.model, fixed.generator
    with fixed.again():
        with watching(watched, f"{type(upper).__name__}.prepare"):
            seen = upper.prepare(model, fixed.batch, generator)
        with watching(watched, f"{type(lower).__name__}.solve (the attack)"):
            # Not a copy of the anchor: an edit of it is to be seen.
            anchor = fixed.solution.anchor
            solution = lower.solve(model, fixed.batch, anchor, generator, differentiable=fixed.differentiable)
        with watching(watched, f"{type(upper).__name__}.loss_at (the upper loss)"):
            return upper.loss_at(model, seen, solution, generator).mean().item()


def reproducible(fixed: Fixed) -> float:
    """F at θ, which is the same whenever it is computed, and draws from the generator alone.

    Raises:
        Fault: "hidden randomness" or "hidden state".
    """
    parts = _values_of_parts(fixed.problem)
    value = fixed.total()
    again = fixed.total()
    if _differ(value, again):
        changed = _changed(parts, _values_of_parts(fixed.problem)) or "something that it keeps outside its attributes"
        raise Fault(
            "hidden state",
            f"F was {value:.10g} and then {again:.10g} at the same θ with the same draws; what has changed is "
            f"{changed}. solve and loss_at must be functions of what they are given; what is remembered changes in "
            "observe",
        )
    if _differ(value, fixed.total(moved=Sources.NAMES)):
        for source in Sources.NAMES:
            if not _differ(value, fixed.total(moved=(source,))):
                continue
            if source == Sources.NAMES[0] and _network_draws(fixed):
                continue  # dropout: it has no other generator, and it is given the same draws every time
            raise Fault(
                "hidden randomness",
                f"F depends on {source}; draw from the generator that draw, prepare and loss_at are given",
            )
    return value


def _differ(one: float, other: float) -> bool:
    return one == one and abs(one - other) > ROUNDING * max(abs(one), abs(other), 1e-3)


def _network_draws(fixed: Fixed) -> bool:
    """Whether the network's own passes draw from torch's global generator."""
    outputs = []
    for moved in ((), Sources.NAMES):
        with fixed.again(moved), torch.no_grad():
            outputs.append(_tensors(fixed.model(fixed.batch.x)))
    return any(not _same(a, b) for a, b in zip(*outputs, strict=True))


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, list | tuple) else []


def _values_of_parts(problem: BilevelProblem) -> dict[str, Any]:
    """What the parts of the problem keep as plain values and tensors, by path."""
    values: dict[str, Any] = {}
    for path, part in _parts(problem).items():
        for name, value in getattr(part, "__dict__", {}).items():
            if isinstance(value, Tensor):
                values[f"{path}.{name}"] = value.detach().clone()
            elif isinstance(value, int | float | str | bool):
                values[f"{path}.{name}"] = value
            elif isinstance(value, list | dict | set | tuple):
                values[f"{path}.{name}"] = f"{len(value)} entries"
    return values


def _parts(problem: BilevelProblem) -> dict[str, object]:
    parts: dict[str, object] = dict(policy.policies(problem))
    places: list[tuple[str, object, str]] = [
        ("upper", problem.upper, "criterion"),
        ("lower", problem.lower, "attack_loss"),
        ("lower", problem.lower, "constraint"),
    ]
    for path, owner, name in places:
        part = getattr(owner, name, None)
        while part is not None:  # a loss may be a wrapper of another, as minus(loss) is
            path = f"{path}.{name}"
            parts.setdefault(path, part)
            name, part = "loss", getattr(part, "loss", None)
    return parts


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    for name, value in after.items():
        if name not in before:
            return f"{name}, which is new"
        old = before[name]
        same = _same(old, value) if isinstance(value, Tensor) and isinstance(old, Tensor) else old == value
        if not same:
            return f"{name}" if isinstance(value, Tensor) else f"{name}, from {old!r:.40} to {value!r:.40}"
    return None


def mean_over_samples(problem: BilevelProblem, fixed: Fixed) -> None:
    """Raise :class:`Fault` where the attack loss is a mean over samples that share nothing.

    It is one number, and its gradient in each sample is 1/B of what it is for that sample alone.
    """
    lower, solution, model = problem.lower, fixed.solution, fixed.model
    loss: Callable[..., Tensor] | None = getattr(lower, "attack_loss", None)
    batch, n = solution.batch, len(solution.batch)
    if loss is None or n < 2 or len(solution.delta) != n:
        return

    def gradient(rows: slice) -> tuple[Tensor, bool]:
        delta = solution.delta[rows].detach().clone().requires_grad_()
        with fixed.again(), attack_mode(model, attack_mode_of(lower)), torch.enable_grad():
            value = loss(model, batch[rows], delta)
            (g,) = torch.autograd.grad(value.sum(), delta, allow_unused=True, materialize_grads=True)
        return g[0], value.ndim == 0

    whole, one_number = gradient(slice(None))
    if not one_number:
        return
    alone, _ = gradient(slice(0, 1))
    if alone.norm() > 0 and (whole * n - alone).norm() <= 1e-9 * alone.norm():
        raise Fault(
            "mean over samples",
            f"the attack loss is one number, a mean over {n} samples that share nothing, so that each one's gradient "
            "is divided by the size of the batch; return one value per sample, [B]",
        )
