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

__all__ = ["Fault", "Watched", "mean_over_samples", "network_draws", "pieces", "reproducible", "watching"]

ROUNDING = 1e-12
"""Relative; on a GPU sums of the same numbers differ by less between two calls."""


class Fault(Exception):
    """What is wrong, by its name among :data:`~bilevel_at.testing.CAUSES`, and in a sentence."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause, self.text = cause, text


class Watched:
    """What the caller owns: parameters, flags, the batch, the anchor, and what ``.grad`` holds.

    Args:
        model: the network.
        batch: the examples.
        anchor: z, where there is one yet.
    """

    def __init__(self, model: nn.Module, batch: Batch, anchor: Tensor | None = None) -> None:
        of_batch = {"x": batch.x, "y": batch.y, "index": batch.index, **batch.more}
        tensors = {f"batch.{name}": value for name, value in of_batch.items()} | {"the anchor": anchor}
        self.tensors = {n: (t, t.detach().clone(), t.requires_grad) for n, t in tensors.items() if t is not None}
        self.parameters = {n: (p, p.data, p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
        self.grads = {n: (p, p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
        self.modes = {n: (module, module.training) for n, module in model.named_modules()}

    def restore(self) -> None:
        """Give everything the values it had."""
        with torch.no_grad():
            for value, before, flag in self.tensors.values():
                value.requires_grad_(flag)
                if not _same(value, before):
                    value.copy_(before)
            for parameter, data, before, flag in self.parameters.values():
                parameter.data = data  # it may have been given another tensor
                parameter.requires_grad_(flag)
                if not _same(data, before):
                    data.copy_(before)
            for parameter, grad, was in self.grads.values():
                if grad is not None and was is not None and not _same(grad, was):
                    grad.copy_(was)
                parameter.grad = grad
        for module, training in self.modes.values():
            module.training = training

    def check(self, who: str) -> None:
        """Raise :class:`Fault` where one of them has changed, in which ``who`` is named."""
        copy = "work on a copy (x = x.clone())"
        for name, (value, before, flag) in self.tensors.items():
            if not _same(value, before):
                raise Fault("edit in place", f"{who} changes {name} in place; {copy}")
            if value.requires_grad != flag:
                raise Fault("edit in place", f"{who} changes requires_grad of {name}; {copy}")
        for name, (parameter, _, before, flag) in self.parameters.items():
            if not _same(parameter.detach(), before) or parameter.requires_grad != flag:
                raise Fault(
                    "edit in place", f"{who} changes parameter {name}, or whether it requires a gradient; {copy}"
                )
        for name, (parameter, grad, was) in self.grads.items():
            if parameter.grad is not grad or (grad is not None and was is not None and not _same(grad, was)):
                raise Fault("fills .grad", f"{who} fills .grad of {name}; use torch.autograd.grad, not backward()")
        for name, (module, training) in self.modes.items():
            if module.training != training:
                raise Fault(
                    "edit in place",
                    f"{who} leaves {name or 'the network'} in {'train' if module.training else 'eval'} mode; use "
                    "ba.attack_mode(model, ...)",
                )


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


def reproducible(fixed: Fixed) -> None:
    """Ask whether F is the same whenever it is computed at θ, and draws from the generator alone.

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
            if source == Sources.NAMES[0] and network_draws(fixed):
                continue  # dropout: it has no other generator, and it is given the same draws every time
            raise Fault(
                "hidden randomness",
                f"F depends on {source}; draw from the generator that draw, prepare and loss_at are given",
            )


def _differ(one: float, other: float) -> bool:
    return one == one and abs(one - other) > ROUNDING * max(abs(one), abs(other), 1e-3)


def network_draws(fixed: Fixed) -> bool:
    """Whether the network, and nothing else, draws from torch's global generator while F is computed."""
    device, inside, outside, drawn = fixed.sources.device, 0, False, False

    def state() -> Tensor:
        parts = [torch.get_rng_state()]
        return torch.cat([*parts, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else parts[0]

    last = state()

    def enter(*_: Any) -> None:
        nonlocal inside, outside
        outside = outside or (inside == 0 and not torch.equal(state(), last))
        inside += 1

    def leave(*_: Any) -> None:
        nonlocal inside, last, drawn
        inside -= 1
        if inside == 0:
            now = state()
            drawn, last = drawn or not torch.equal(now, last), now

    hooks = [module.register_forward_pre_hook(enter) for module in fixed.model.modules()]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in fixed.model.modules()]
    try:
        with fixed.again():
            last = state()
            fixed.compute()
            return drawn and not outside and torch.equal(state(), last)
    finally:
        for hook in hooks:
            hook.remove()


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
    try:
        alone, _ = gradient(slice(0, 1))
    except Exception:  # a loss of the user's own that cannot be had of one sample couples them
        return
    if alone.norm() > 0 and (whole * n - alone).norm() <= 1e-9 * alone.norm():
        raise Fault(
            "mean over samples",
            f"the attack loss is one number, a mean over {n} samples that share nothing, so that each one's gradient "
            "is divided by the size of the batch; return one value per sample, [B]",
        )
