"""The two players: what each wants, and where the attacker may move.

    min_θ  mean_i f(θ, δ*_i(θ))    subject to    δ*_i(θ) ∈ argmin_{δ ∈ C(x_i)} g(θ, δ; z_i)

f is the upper (defender's) loss, g the lower (attacker's) objective, z an anchor that g may depend on.
Source: Fast-BAT paper (Zhang et al., 2022), equations 2, 3 and 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import descent
from .anchors import Anchor, anchor_policy
from .batch import Batch
from .constraints import ActiveSet, Constraint
from .errors import InputError
from .losses import Loss, cross_entropy
from .modes import Mode, attack_mode, no_graph

__all__ = ["BilevelProblem", "Curvature", "LowerProblem", "Solution", "UpperProblem"]

Curvature = Literal["lower", "attack"]
CrossAt = Literal["anchor", "solution"]


@dataclass
class Solution:
    """What a lower level hands to the solver.

    delta: δ* ``[B, ...]``, detached. anchor: the z it was solved from, which a check can hand back to hold it.
    lam: λ, the weight of the proximal term in g (a number or ``[B]``), 0 where g has none.
    step: the step sizes used, where the closed form has them (a number or ``[B]``).
    batch: the batch as the lower level saw it, row for row with ``delta``; it differs from the upper level's
        where there are several perturbations per example, or targets.
    gradient: ∇_δ g(θ, δ*; z), differentiable in θ; present where a solver asked for it.
    attack_gradient: ∇_δ ℓ_atk(θ, z), detached, where the closed form needed it.
    clean_gradient: ∇_δ ℓ_atk(θ, 0), detached, where that is where the solve began.
    residual: how far from a fixed point an iterative solve stopped, ``[B]``.
    """

    delta: Tensor
    anchor: Tensor
    batch: Batch
    lam: Tensor | float = 0.0
    step: Tensor | float | None = None
    gradient: Tensor | None = None
    attack_gradient: Tensor | None = None
    clean_gradient: Tensor | None = None
    residual: Tensor | None = None

    @classmethod
    def of(cls, found: Any, batch: Batch) -> Solution:
        """``found`` itself, or what an object with ``delta``, ``anchor`` and perhaps ``lam`` says about ``batch``."""
        return found if isinstance(found, cls) else cls(found.delta, found.anchor, batch, getattr(found, "lam", 0.0))


class UpperProblem:
    """The defender: f(θ, δ), one value per sample. Subclass and override :meth:`loss`, or pass a loss function."""

    def __init__(self, loss: Loss = cross_entropy) -> None:
        self.criterion = loss

    def loss(self, model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
        """f(θ, δ) ``[B]``; the solver minimises its mean."""
        return self.criterion(model, batch, delta)

    def loss_at(
        self, model: nn.Module, batch: Batch, solution: Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        """f ``[B]`` at the lower level's solution.

        Override for a loss that draws something at random, from ``generator``, or reuses what the solution carries
        (a regulariser's gradient).
        """
        return self.loss(model, batch, solution.delta)


class LowerProblem:
    """The attacker: δ* ∈ argmin_{δ ∈ C(x)} g(θ, δ; z).

    A subclass needs a ``constraint`` and :meth:`objective`; the default :meth:`solve` is projected gradient descent
    to ``tol``, which suits a smooth strongly convex g. Closed forms override it.

    Class attributes, each of which a subclass or an instance may set:

    mode: 'train' or 'eval', the mode in which attack passes see the model; always restored afterwards.
    anchor: the policy that draws z where none is given, or its name.
    attack_loss: ℓ_atk, where g is built from one; FullKKT's ``curvature="attack"`` needs it. As a class attribute, a
        plain function has to be a ``staticmethod``.
    hessian_is_lam: True where ∇²_δδ g is exactly λI, so that no Hessian has to be computed.
    learns: True where :meth:`learn` wants the gradient of the upper pass.
    tol, max_iter: for the default solve; ``tol=None`` is eps^¾ of the dtype (6e-6 in float32, 2e-12 in float64).
    """

    constraint: Constraint
    mode: Mode = "eval"
    anchor: Anchor | str = "zero"
    attack_loss: Loss | None = None
    hessian_is_lam: bool = False
    learns: bool = False
    tol: float | None = None
    max_iter: int = 10_000

    def objective(self, model: nn.Module, batch: Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        """g(θ, δ; z) ``[B]``, minimised."""
        raise NotImplementedError(f"{type(self).__name__} does not define objective(model, batch, delta, anchor)")

    def solve(
        self,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Solution:
        """δ* and the anchor it was solved from; ``anchor`` holds z fixed, otherwise the policy draws it.

        Raises :class:`ConvergenceError`, naming the samples, where ``tol`` was not reached in ``max_iter`` steps.
        """
        lam = self.proximal_weight()
        with torch.enable_grad(), attack_mode(model, self.mode):
            seen = self.prepare(model, batch)
            z = self.draw_anchor(model, seen, generator) if anchor is None else anchor.detach()
            delta, residual = descent.projected_gradient(
                lambda d: self.objective(model, seen, d, z),
                self.constraint.project(z, batch.x),
                lambda d: self.constraint.project(d, batch.x),
                tol=self.tol,
                max_iter=self.max_iter,
                scale=1 / lam if lam else 1.0,
            )
        if anchor is None:
            self.policy().remember(batch, delta)
        return Solution(delta, z, batch, lam=lam, residual=residual)

    def solve_differentiable(
        self,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
        at: CrossAt = "anchor",
    ) -> Solution:
        """:meth:`solve`, with ``solution.gradient`` = ∇_δ g(θ, δ*; z) ready to be differentiated in θ.

        ``at`` matters to linearised objectives only: where their cross derivative is taken. Override where the
        solve can keep what this would compute again.
        """
        solution = Solution.of(self.solve(model, batch, anchor, generator), batch)
        with torch.enable_grad(), attack_mode(model, self.mode):
            delta = solution.delta.detach().requires_grad_()
            values = self.objective(model, solution.batch, delta, solution.anchor)
            (solution.gradient,) = torch.autograd.grad(values.sum(), delta, create_graph=True)
        return solution

    def prepare(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch as attack passes see it: with what the attack loss would otherwise compute anew in each of them.

        An attack loss that has a method ``prepare(model, batch) -> Batch`` is asked once per solve, in the mode of the
        attack, and returns the batch with ``reference`` set. Its answer serves where no derivative in θ is taken; where
        one is, the loss sees ``reference=None`` and computes it. Raises :class:`InputError` where it is not a batch.
        """
        prepare = getattr(self.attack_loss, "prepare", None)
        if prepare is None:
            return batch
        with no_graph():
            prepared = prepare(model, batch)
        if not isinstance(prepared, Batch):
            raise InputError(f"prepare(model, batch) returns {type(prepared).__name__}; it must return the Batch")
        return prepared

    def learn(self, solution: Solution, gradient: Tensor) -> None:
        """Called after the upper pass with ∇_δ of the mean upper loss at δ*, where ``learns`` is set.

        The pass that differentiates f in θ gives this gradient for nothing; Free-AT attacks with it. Not called where
        the anchor was given, as in a check. What is kept here belongs in :meth:`state_dict`, or a resumed run differs.
        """

    def policy(self) -> Anchor:
        """The anchor policy. A name becomes this instance's own policy on first use, which may hold state."""
        if not isinstance(self.anchor, Anchor):
            object.__setattr__(self, "anchor", anchor_policy(self.anchor))  # a frozen dataclass is a problem too
        assert isinstance(self.anchor, Anchor)
        return self.anchor

    def draw_anchor(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """z from the policy."""
        return self.policy().draw(self, model, batch, generator).detach()

    def attack_gradient(self, model: nn.Module, batch: Batch, delta: Tensor, create_graph: bool = False) -> Tensor:
        """∇_δ ℓ_atk(θ, δ), the sum over samples of per-sample losses differentiated: ``[B, ...]``."""
        if self.attack_loss is None:
            raise InputError(f"{type(self).__name__} has no attack_loss, which this step policy or anchor needs")
        delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            values = self.attack_loss(model, batch, delta)
            if values.shape != (len(batch),):
                raise InputError(
                    f"the attack loss has shape {tuple(values.shape)}; it must be one value per sample, [{len(batch)}]"
                )
            if not values.requires_grad:
                raise InputError("the model's output has no gradient in its input; only square attacks need none")
            (gradient,) = torch.autograd.grad(values.sum(), delta, create_graph=create_graph)
        return gradient

    def proximal_weight(self) -> float:
        """λ of g, 0 where g has no proximal term."""
        return 0.0

    def step_size(self) -> float | None:
        """The step 1/λ, where one is fixed; anchors that take steps use it unless given their own."""
        return None

    def curved_part(
        self, model: nn.Module, solution: Solution, curvature: Curvature
    ) -> tuple[Callable[[Batch, Tensor, Tensor], Tensor] | None, Tensor | float]:
        """(ℓ, λ) such that H = ∇²_δδ ℓ + λI; ℓ(batch, delta, anchor) -> ``[B]``, or None where H = λI."""
        if curvature == "attack":
            loss = self.attack_loss
            if loss is None:
                raise InputError(f'curvature="attack" needs an attack_loss, and {type(self).__name__} has none')
            return lambda batch, delta, anchor: loss(model, batch, delta), solution.lam
        if self.hessian_is_lam:
            return None, solution.lam
        return lambda batch, delta, anchor: self.objective(model, batch, delta, anchor), 0.0

    def active(self, solution: Solution) -> ActiveSet:
        """The constraints that bind at δ*."""
        gradient = None if solution.gradient is None else solution.gradient.detach()
        return self.constraint.active(solution.delta, solution.batch.x, gradient)

    def held(self, solution: Solution) -> LowerProblem:
        """This problem with every choice that is not part of g's dependence on θ fixed as ``solution`` made it.

        A finite-difference check needs it together with ``anchor=solution.anchor``.
        """
        return self

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Tell policies that change over training that epoch ``epoch`` of ``epochs`` (from 0) begins."""
        self.policy().set_epoch(epoch, epochs)

    def state_dict(self) -> dict[str, Any]:
        """What outlives a batch (remembered perturbations, gradient norms): tensors and plain values only."""
        return self.policy().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.policy().load_state_dict(state)


@dataclass
class BilevelProblem:
    """An upper and a lower problem. A :class:`~bilevel_at.Solver` says how they are coupled.

    replays: how many updates of θ a trainer makes on each batch before it takes the next, at least 1 (Free-AT's m).
    """

    upper: UpperProblem
    lower: LowerProblem
    replays: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.replays, int) or self.replays < 1:
            raise InputError(f"replays is {self.replays}; it must be a whole number, at least 1")

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Call at the start of each epoch where policies change over training (ATTA, ATAS)."""
        self.lower.set_epoch(epoch, epochs)

    def state_dict(self) -> dict[str, Any]:
        return self.lower.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lower.load_state_dict(state)
