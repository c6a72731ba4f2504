"""Feasible sets that a user might write: one that knows its active set, and one that can only be projected onto."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

import bilevel_at as ba

F64 = torch.float64


class Slab(ba.Constraint):
    """C = {δ : |⟨a, δ⟩| ≤ width} for a unit vector a of equal entries."""

    def __init__(self, width):
        self.width = width

    def _along(self, delta):
        flat = delta.flatten(1)
        a = torch.full_like(flat[0], 1 / math.sqrt(flat.shape[1]))
        return a, flat @ a

    def project(self, delta, x):
        a, along = self._along(delta)
        return delta - ((along - along.clamp(-self.width, self.width))[:, None] * a).reshape(delta.shape)

    def sample(self, x, generator=None):
        return self.project(self.width * torch.randn(x.shape, generator=generator, dtype=x.dtype), x)

    def active(self, delta, x, gradient=None):
        a, along = self._along(delta)
        on = along.abs() >= self.width - 1e-10
        return ba.ActiveSet(torch.ones_like(delta, dtype=torch.bool), (on[:, None] * a)[:, None])

    def strict_complementarity(self, delta, x, gradient):
        a, along = self._along(delta)
        slack = self.width - along.abs()
        return torch.where(slack <= 1e-10, (gradient.flatten(1) @ a).abs(), slack)


class Cylinder(ba.Constraint):
    """C = {δ : ‖first half of δ‖₂ ≤ radius}: curved in some directions and not in others, known by its projection."""

    def __init__(self, radius):
        self.radius = radius

    def project(self, delta, x):
        flat = delta.flatten(1)
        half = (flat.shape[1] + 1) // 2
        head = flat[:, :half]
        head = head * (self.radius / head.norm(dim=1, keepdim=True).clamp(min=1e-38)).clamp(max=1)
        return torch.cat([head, flat[:, half:]], 1).reshape(delta.shape)

    def margin(self, u):
        """How far the points u, before they are projected, are from the surface: the least over the batch."""
        half = (u.flatten(1).shape[1] + 1) // 2
        return (u.flatten(1)[:, :half].norm(dim=1) - self.radius).abs().min().item()


def slabs(shape):
    return st.floats(0.02, 0.4).map(Slab)


def cylinders(shape):
    return st.floats(0.05, 0.4).map(Cylinder)
