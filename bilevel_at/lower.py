"""The lower levels most methods are made of: the closed-form linearised family, and the proximal problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .anchors import Anchor, Steps, anchor_policy
from .batch import Batch, per_sample
from .constraints import Constraint
from .directions import Direction, direction_of
from .draws import difference
from .errors import InputError, positive, whole_number
from .losses import AnyLoss, input_gradient
from .modes import Mode
from .policy import Number
from .problem import CurvedPart, LowerProblem, solve_by_descent
from .solution import Solution
from .steps import Step, step_policy

__all__ = ["AtAnchor", "Linearized", "Proximal"]


@dataclass(eq=False)
class Linearized(LowerProblem):
    """The linearised attacker, solved in closed form.

        g(θ, δ; z) = ⟨D(∇_δ ℓ_atk(θ, z)), δ − z⟩ + λ/2 ‖δ − z‖²
        δ*(θ)     = P_C(z − D(∇_δ ℓ_atk(θ, z)) / λ)

    FGSM, FGSM-RS, PGD-K, ATTA, ATAS and Fast-BAT are points of this space (Fast-BAT paper, equations 5 to 9; ATAS
    paper, equation 5). With an adaptive step, λ is treated as a constant of the solve, as z is.

    Args:
        attack_loss: ℓ_atk(model, batch, delta) -> ``[B]``, minimised; ``minus(cross_entropy)`` as a rule.
        constraint: C(x).
        anchor: z, a policy or its name: "zero", "uniform", "corner", "sign-step", "gradient-step", "remembered".
        direction: D, "sign" (Fast-AT, equation 5), "taylor" (Fast-BAT, equation 8) or "normalized".
        step: 1/λ, a number, a schedule, or a policy (:class:`~bilevel_at.Adaptive`).
        mode: 'train' or 'eval', the mode in which attack passes see the model.
        keep_output: keep f(x + z) with its graph as ``solution.output``, for an upper loss that shares the pass at z.

    Raises:
        InputError: for unknown names and steps that are not positive; from :meth:`solve`, for an unknown mode, for
            inputs outside the constraint's range, and where a policy needs ``batch.index``.
    """

    attack_loss: AnyLoss
    constraint: Constraint
    anchor: Anchor | str = "uniform"
    direction: Direction | str = "sign"
    step: Step | Number = 8 / 255
    mode: Mode = "eval"
    keep_output: bool = False

    def __post_init__(self) -> None:
        self.direction = direction_of(self.direction)
        self.step = step_policy(self.step)
        self.anchor = anchor_policy(self.anchor, self.step)

    @classmethod
    def pgd(
        cls,
        attack_loss: AnyLoss,
        constraint: Constraint,
        steps: int,
        step: Step | Number,
        start: Anchor | str = "uniform",
        direction: Direction | str = "sign",
        mode: Mode = "eval",
    ) -> Linearized:
        """``steps`` projected steps from ``start``: the last is the closed form, around the anchor that the ones before
        it reach.

        Args:
            steps: at least 1.
            step: the length of each.
            start: the anchor they begin at, or its name.
            attack_loss, constraint, direction, mode: as for the class.

        Raises:
            InputError: where ``steps`` is below 1.
        """
        whole_number("steps", steps, 1)
        anchor = start if steps == 1 else Steps(start, direction, count=steps - 1)
        return cls(attack_loss, constraint, anchor, direction, step, mode)

    def objective(self, model: nn.Module, batch: Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        """g ``[B]``, differentiable in θ and δ; an adaptive step is the one that a solve at this anchor would take."""
        gradient, _ = input_gradient(self.attack_loss, model, batch, anchor, create_graph=True)
        step = step_policy(self.step).size(batch, gradient.detach())
        moved = (delta - anchor).flatten(1)
        return (direction_of(self.direction)(gradient).flatten(1) * moved).sum(1) + moved.square().sum(1) / (2 * step)

    def solve_at(self, model: nn.Module, batch: Batch, anchor: Tensor, differentiable: bool) -> Solution:
        """δ* in closed form. The graph of the gradient taken at z is kept where it will be differentiated."""
        direction, graph = direction_of(self.direction), differentiable
        gradient, output = input_gradient(
            self.attack_loss,
            model,
            batch,
            anchor,
            create_graph=graph and not direction.piecewise_constant,
            keep_output=self.keep_output,
        )
        step = step_policy(self.step).size(batch, gradient.detach())
        slope = direction(gradient)
        with torch.no_grad():
            base = self.base(model, batch)
        delta = self.constraint.project(anchor - per_sample(step, anchor) * slope.detach(), base).detach()
        lam = 1 / step
        return Solution(
            delta,
            anchor,
            batch,
            lam=lam,
            gradient=slope + per_sample(lam, delta) * (delta - anchor) if differentiable else None,
            attack_gradient=gradient.detach(),
            kept_output=output,
        )

    def change(self, model: nn.Module, solution: Solution, before: Tensor, after: Tensor) -> Tensor:
        """Σ ℓ_atk(θ, z + u) − ℓ_atk(θ, z − u), u = ½ Jᵀ(after − before), with J the derivative of D.

        This stands for ⟨D(∇_δ ℓ_atk(θ, z)), after − before⟩, which has input gradients of the network in it. Their
        gradients in θ agree up to third order in u where ℓ_atk is smooth; on networks with kinks (ReLU), only where no
        unit changes its side between the two points.
        """
        slope = solution.attack_gradient
        if slope is None:
            raise InputError(f"a solution of {type(self).__name__} has its attack_gradient; this one has none")
        with torch.enable_grad():
            slope = slope.detach().requires_grad_()
            read = direction_of(self.direction)(slope)
            (u,) = torch.autograd.grad(read, slope, (after - before) / 2)
        z = solution.anchor
        return difference(lambda d: self.attack_loss(model, solution.batch, d), z - u, z + u)

    def curvature(self, model: nn.Module, solution: Solution) -> tuple[CurvedPart | None, Tensor | float]:
        return None, solution.lam


@dataclass(eq=False)
class Proximal(LowerProblem):
    """The attacker's loss itself, pulled towards an anchor, solved by projected gradient descent.

        g(θ, δ; z) = ℓ_atk(θ, δ) + λ/2 ‖δ − z‖²

    With λ → 0 this is the attacker of equation 3 of the Fast-BAT paper; its hypergradient is Proposition 1's with the
    true Hessian.

    Args:
        attack_loss: ℓ_atk(model, batch, delta) -> ``[B]``, minimised.
        constraint: C(x).
        lam: λ > 0; where λ exceeds −λ_min(∇²ℓ_atk), g is strongly convex and δ* unique.
        anchor: z, a policy or its name.
        tol: on max |δ − P_C(δ − ∇g/λ)|, by default eps^¾ of the dtype.
        max_iter: steps allowed.
        mode: 'train' or 'eval', the mode in which attack passes see the model.

    Raises:
        InputError: where λ or tol is not positive.
        ConvergenceError: from :meth:`solve`, naming the samples that need more steps.
    """

    attack_loss: AnyLoss
    constraint: Constraint
    lam: float
    anchor: Anchor | str = "uniform"
    tol: float | None = None
    max_iter: int = 10_000
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        self.lam = positive("lam", self.lam)
        if self.tol is not None:
            positive("tol", self.tol)
        self.anchor = anchor_policy(self.anchor, 1 / self.lam)

    def objective(self, model: nn.Module, batch: Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        """g = ℓ_atk(θ, δ) + λ/2 ‖δ − z‖², ``[B]``; one number where δ is shared or the loss is coupled."""
        loss = self.attack_loss(model, batch, delta)
        pull = self.lam / 2 * (delta - anchor).flatten(1).square().sum(1)
        return loss + pull if loss.shape == pull.shape else loss.sum() + pull.sum()

    def solve_at(self, model: nn.Module, batch: Batch, anchor: Tensor, differentiable: bool) -> Solution:
        return solve_by_descent(
            self, model, batch, anchor, differentiable, lam=self.lam, tol=self.tol, max_iter=self.max_iter
        )


@dataclass(eq=False)
class AtAnchor(LowerProblem):
    """The attacker stays at its anchor: g(θ, δ; z) = ½ ‖δ − z‖², so δ* = P_C(z), which does not depend on θ.

    From "zero" this is standard training; from an anchor that learns, the anchor is the attack (Free-AT).

    Args:
        constraint: C(x).
        anchor: z, a policy or its name.
        mode: 'train' or 'eval', the mode in which the anchor's passes see the model, where it makes any.
    """

    constraint: Constraint
    anchor: Anchor | str = "zero"
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        self.anchor = anchor_policy(self.anchor)

    def objective(self, model: nn.Module, batch: Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        """g ``[B]``."""
        return (delta - anchor).flatten(1).square().sum(1) / 2

    def solve_at(self, model: nn.Module, batch: Batch, anchor: Tensor, differentiable: bool) -> Solution:
        with torch.no_grad():
            base = self.base(model, batch)
        delta = self.constraint.project(anchor, base)
        return Solution(delta, anchor, batch, lam=1.0, gradient=delta - anchor if differentiable else None)

    def curvature(self, model: nn.Module, solution: Solution) -> tuple[CurvedPart | None, Tensor | float]:
        return None, solution.lam
