"""What is wrong with a lower problem whose δ* does not move as the implicit function theorem says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..batch import per_sample
from ..modes import attack_mode
from ..problem import attack_mode_of, base_at
from ..solution import Solution
from .conditions import kkt_residual, lam_of_rows
from .fixed import Along, Fixed, at, moved_by, unit_like

__all__ = ["lower_fault"]

H = 1e-4
"""Of second differences of g, whose rounding is 1e-16 / H² and whose error H²."""


def lower_fault(fixed: Fixed, along: Along) -> tuple[str, str] | None:
    """(cause, explanation) of the first thing that does not hold of the lower problem; None where all of them do.

    Args:
        fixed: F, everything but θ fixed.
        along: a direction in θ along which δ* moves otherwise.
    """
    lower = _Lower(fixed, along)
    for look in (
        lower.anchor,
        lower.constraint,
        lower.minimiser,
        lower.gradient,
        lower.cross,
        lower.curvature,
        lower.active,
    ):
        try:
            fault = look()
        except Exception:  # the user's own code may refuse any of these questions
            continue
        if fault is not None:
            return fault
    return None


class _Lower:
    """g near (θ, δ*), as the lower problem has it and as differences have it."""

    def __init__(self, fixed: Fixed, along: Along) -> None:
        self.fixed, self.along = fixed, along
        self.problem, self.model = fixed.problem.lower, fixed.model
        self.here = fixed.attacked(differentiable=True)
        self.noise = unit_like(self.here.delta)

    @contextmanager
    def attacking(self) -> Iterator[None]:
        with self.fixed.again(), attack_mode(self.model, attack_mode_of(self.problem)):
            yield

    def g(self, moved: Tensor, h: float = 0.0) -> float:
        """Σ g(θ + h·u, δ* + moved; z)."""
        with at(self.model, moved_by(self.model, self.along, h)), self.attacking():
            here = self.here
            return self.problem.objective(self.model, here.batch, here.delta + moved, here.anchor).sum().item()

    def anchor(self) -> tuple[str, str] | None:
        with at(self.model, moved_by(self.model, self.along, H)):
            there = self.fixed.attacked().anchor
        change = (there - self.here.anchor).abs().max().item()
        if change == 0.0:
            return None
        return "anchor depends on θ", (
            f"as θ moves by {H:g}, solution.anchor moves by {change:.3g}, though z is given: solve_at must solve from "
            "the anchor that it gets"
        )

    def constraint(self) -> tuple[str, str] | None:
        lower, far = self.problem, 2 * self.noise * (1 + self.here.delta.norm())
        points = [self.here.delta + far, self.here.delta - far]

        def nearest() -> list[Tensor]:
            with self.fixed.again(), torch.no_grad():
                base = base_at(lower, self.model, self.here.batch)
                return [lower.constraint.project(point, base) for point in points]

        before = nearest()
        with at(self.model, moved_by(self.model, self.along, H)):
            change = max((a - b).abs().max().item() for a, b in zip(nearest(), before, strict=True))
        if change == 0.0:
            return None
        return (
            "constraint depends on θ",
            f"as θ moves by {H:g}, the constraint, or base, which it is around, moves by {change:.3g}",
        )

    def minimiser(self) -> tuple[str, str] | None:
        with self.fixed.again():
            off = kkt_residual(self.problem, self.model, self.here).max().item()
        if off <= 1e-5 * max(1.0, self.here.delta.abs().max().item()):
            return None
        return "not a minimiser", (
            f"a projected gradient step on g moves δ* by {off:.3g}, where it moves a minimiser by 0; solve_at and "
            "objective do not belong to the same problem, or the solve stops early"
        )

    def gradient(self) -> tuple[str, str] | None:
        if self.here.gradient is None:
            return None
        claimed = (self.here.gradient.detach() * self.noise).sum().item()
        measured = (self.g(H * self.noise) - self.g(-H * self.noise)) / (2 * H)
        if _close(claimed, measured, self.here.gradient.norm().item()):
            return None
        return "∇g", (
            f"along a random direction solution.gradient is {claimed:.6g}, and differences of the objective give "
            f"{measured:.6g}"
        )

    def cross(self) -> tuple[str, str] | None:
        """∇_θ ⟨∇_δ g, w⟩ by autograd, along the direction in θ, and by differences of g."""
        noise, h = self.noise, H
        measured = self.g(h * noise, h) - self.g(-h * noise, h) - self.g(h * noise, -h) + self.g(-h * noise, -h)
        measured /= 4 * h * h
        claimed, scale = 0.0, 0.0
        gradient = self.fixed.attacked(differentiable=True).gradient
        if gradient is not None and gradient.requires_grad:
            named = dict(self.model.named_parameters())
            moving = [named[name] for name in self.along]
            parts = torch.autograd.grad(gradient, moving, noise, allow_unused=True, materialize_grads=True)
            claimed = sum((part * u).sum().item() for part, u in zip(parts, self.along.values(), strict=True))
            scale = torch.stack([part.norm() for part in parts]).norm().item()
        if _close(claimed, measured, scale):
            return None
        if gradient is None or not gradient.requires_grad:
            return "attack term without θ", (
                f"the cross derivative ∇_θ ⟨∇_δ g, w⟩ is {measured:.6g} by differences, and solution.gradient has no "
                "graph: solve_at(..., differentiable=True) must return ∇_δ g with one (create_graph=True, no detach)"
            )
        return "attack term without θ", (
            f"the cross derivative ∇_θ ⟨∇_δ g, w⟩ is {measured:.6g} by differences and {claimed:.6g} by autograd: part "
            "of the attack's objective is detached from θ (detach, .data, no_grad, NumPy)"
        )

    def curvature(self) -> tuple[str, str] | None:
        here = self.here
        with self.attacking():
            base = base_at(self.problem, self.model, here.batch).detach()
            active = self.problem.constraint.active(
                here.delta, base, None if here.gradient is None else here.gradient.detach()
            )
            along = active.tangent(self.noise)
            if along.norm() == 0:
                return None
            along = along / along.norm()
            part, lam = self.problem.curvature(self.model, here)
            lam = lam_of_rows(lam, along)
            claimed = (lam * along.flatten(1).square().sum(1)).sum().item()
            if part is not None:
                claimed += _second(part, here, along)
        k = 1e-3
        measured = (self.g(k * along) - 2 * self.g(0 * along) + self.g(-k * along)) / k**2
        if abs(claimed - measured) <= 1e-4 * max(abs(claimed), abs(measured), 1e-6):
            return None
        return "λ", (
            f"along a free direction the second derivative of g is {measured:.6g} by differences; solution.lam and "
            f"curvature() say {claimed:.6g}" + (f", {claimed / measured:.4g} times that" if measured else "")
        )

    def active(self) -> tuple[str, str] | None:
        """P_C moves u = δ* − ∇g/λ within the directions that active() leaves free, and in no other."""
        here, k = self.here, 1e-7
        if here.gradient is None:
            return None
        with torch.no_grad(), self.attacking():
            base, slope = base_at(self.problem, self.model, here.batch), here.gradient.detach()
            constraint = self.problem.constraint
            active = constraint.active(here.delta, base, slope)
            lam = lam_of_rows(here.lam, slope)
            u = here.delta - slope / per_sample(torch.where(lam > 0, lam, 1.0), slope)
            moved = (constraint.project(u + k * self.noise, base) - constraint.project(u - k * self.noise, base)) / (
                2 * k
            )
            bound, free = moved - active.tangent(moved), active.tangent(self.noise)
        if bound.norm() > 1e-4:
            return "active set", f"project moves δ* by {bound.norm():.3g} along what active() says is bound"
        unmoved = (free * moved).sum() <= 0.01 * free.square().sum() and free.norm() > 1e-4
        if unmoved and bool((lam > 0).any()):
            return "active set", "project does not move δ* along what active() says is free"
        share = (moved - free).norm() / max(free.norm().item(), 1e-12)
        if active.curvature is None and share > 1e-4:
            return "active set", f"project and active() differ by {share:.3g} about how δ* moves"
        return None


def _second(part: object, here: Solution, along: Tensor) -> float:
    delta = here.delta.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = part(here.batch, delta, here.anchor).sum()  # type: ignore[operator]
        (first,) = torch.autograd.grad(value, delta, create_graph=True)
        (second,) = torch.autograd.grad((first * along).sum(), delta, allow_unused=True, materialize_grads=True)
    return (second * along).sum().item()


def _close(claimed: float, measured: float, scale: float) -> bool:
    return abs(claimed - measured) <= 1e-5 * max(abs(claimed), abs(measured), 0.1 * scale) + 1e-7
