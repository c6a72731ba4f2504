"""What a lower level and a solver hand back: :class:`Solution` and :class:`Hypergradient`, both read-only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch
from .errors import InputError

__all__ = ["Gradients", "Hypergradient", "Solution"]

Gradients = Mapping[str, Tensor | None]


@dataclass(frozen=True, eq=False)
class Solution:
    """The lower level's solution. A lower problem of your own returns ``Solution(delta, anchor, batch)``.

    delta: δ* ``[B, ...]``, detached.
    anchor: the z it was solved from; handing it back to ``solve`` gives the same solution.
    batch: the batch as the attack saw it, row for row with ``delta``: prepared, and with several rows per example where
        there are several perturbations per example.
    lam: λ, the weight of the proximal term in g, a number or ``[B]``; 0 where g has none.
    gradient: ∇_δ g(θ, δ*; z) with its graph in θ; only of a differentiable solve, and None there where δ* has no
        derivative in θ.
    attack_gradient: ∇_δ ℓ_atk(θ, z), detached, where the closed form needed it.
    kept_output: the output f(x + z) with its graph; read it as :attr:`output`.
    residual: how far from a fixed point an iterative solve stopped, ``[B]``.
    memo: whatever the anchor's ``draw`` wants to see again in ``observe``.
    drawn: whether the anchor policy drew ``anchor``, rather than the caller.
    """

    delta: Tensor
    anchor: Tensor
    batch: Batch
    lam: Tensor | float = 0.0
    gradient: Tensor | None = None
    attack_gradient: Tensor | None = None
    kept_output: Any = None
    residual: Tensor | None = None
    memo: Any = None
    drawn: bool = False

    @property
    def output(self) -> Any:
        """The network's output at x + z, with its graph, to be shared by the upper loss.

        Raises:
            InputError: where the lower problem did not keep it (``Linearized(keep_output=True)`` does).
        """
        if self.kept_output is None:
            raise InputError("the output at the anchor was not kept; compose the lower problem with keep_output=True")
        return self.kept_output


@dataclass(frozen=True, eq=False)
class Hypergradient:
    """dF/dθ and what it is made of.

    losses: the upper level's losses, ``[B]`` (or one number, where the batch is coupled), detached.
    direct: ∇_θ f by parameter name, for parameters that require a gradient; None where a parameter does not matter, as
        ``torch.autograd.grad(..., allow_unused=True)`` has it.
    implicit: the implicit term as it is added, by parameter name; None likewise.
    solution: the lower level's solution, detached.
    v: ∇_δ f of the batch mean, shaped like δ*.
    scale: what the upper loss was multiplied by before anything was differentiated (a GradScaler's factor). ``direct``,
        ``implicit`` and ``v`` carry it; losses and norms do not.
    """

    losses: Tensor
    direct: Gradients
    implicit: Gradients
    solution: Solution
    v: Tensor
    scale: float = 1.0

    @property
    def loss(self) -> Tensor:
        """The mean upper loss, detached."""
        return self.losses.mean()

    @cached_property
    def grads(self) -> dict[str, Tensor | None]:
        """dF/dθ by parameter name: the direct and the implicit term together."""
        return {name: _add(direct, self.implicit.get(name)) for name, direct in self.direct.items()}

    def add_to(self, model: nn.Module, weight: float = 1.0) -> None:
        """Add ``weight`` times :attr:`grads` to ``.grad``, as ``(weight * loss).backward()`` would."""
        for name, parameter in model.named_parameters():
            gradient = self.grads.get(name)
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = weight * gradient
            else:
                parameter.grad.add_(gradient, alpha=weight)

    @cached_property
    def direct_norm(self) -> Tensor:
        """‖∇_θ f‖₂, a 0-dim tensor."""
        return self._norm(self.direct) / self.scale

    @cached_property
    def implicit_norm(self) -> Tensor:
        """The norm of the implicit term as it is added, a 0-dim tensor."""
        return self._norm(self.implicit) / self.scale

    @cached_property
    def implicit_cosine(self) -> Tensor:
        """The cosine between the two terms, 0 where either is zero."""
        pairs = [(d, self.implicit.get(name)) for name, d in self.direct.items()]
        present = [(a.detach(), b.detach()) for a, b in pairs if a is not None and b is not None]
        if not present:
            return torch.zeros_like(self.direct_norm)
        # In float32 at least, and in few calls: on a GPU each costs more to launch than to compute.
        wide = [_wide(part) for part in zip(*present, strict=True)]
        inner = torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(*wide, strict=True)]).sum()
        norms = self.direct_norm * self.implicit_norm * self.scale**2
        return torch.where(inner == 0, inner, inner / norms).clamp(-1, 1)

    def _norm(self, gradients: Gradients) -> Tensor:
        present = _wide([g.detach() for g in gradients.values() if g is not None])
        if not present:
            return torch.zeros_like(self.loss)
        return torch.stack(torch._foreach_norm(present)).norm()


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
