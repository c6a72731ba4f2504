"""The lower levels most methods are made of: the closed-form linearised family, and the proximal problem."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .anchors import Anchor, Steps, Zero, anchor_policy
from .batch import Batch, per_sample
from .constraints import Constraint
from .directions import Direction, direction_of
from .errors import InputError
from .losses import Loss
from .modes import Mode, attack_mode
from .problem import CrossAt, LowerProblem, Solution
from .steps import Constant, Step, positive, step_policy

__all__ = ["Linearized", "Proximal"]


@dataclass(eq=False)
class Linearized(LowerProblem):
    """The linearised attacker, solved in closed form.

        g(θ, δ; z) = ⟨D(∇_δ ℓ_atk(θ, z)), δ − z⟩ + λ/2 ‖δ − z‖²
        δ*(θ)     = P_C(z − D(∇_δ ℓ_atk(θ, z)) / λ)

    attack_loss: ℓ_atk(model, batch, delta) -> ``[B]``, minimised; ``minus(cross_entropy)`` as a rule.
    constraint: C(x).
    anchor: z, a policy or its name: "zero", "uniform", "corner", "sign-step", "gradient-step", "remembered".
    direction: D, "sign" (Fast-AT, equation 5), "taylor" (Fast-BAT, equation 8) or "normalized".
    step: 1/λ, a number or a policy (:class:`~bilevel_at.Adaptive`).
    mode: 'train' or 'eval', the mode in which attack passes see the model.

    FGSM, FGSM-RS, PGD-K, ATTA, ATAS and Fast-BAT are points of this space (Fast-BAT paper, equations 5 to 9; ATAS
    paper, equation 5). With an adaptive step, λ is treated as a constant of the solve, as z is.

    Raises :class:`InputError` for unknown names and for steps that are not positive; from :meth:`solve`, for an unknown
    mode, for inputs outside the constraint's range, and where a policy needs ``batch.index``.
    """

    attack_loss: Loss = field()  # no default, although the base class has one
    constraint: Constraint
    anchor: Anchor | str = "uniform"
    direction: Direction | str = "sign"
    step: Step | float = 8 / 255
    mode: Mode = "eval"

    hessian_is_lam = True

    def __post_init__(self) -> None:
        self.anchor = anchor_policy(self.anchor)
        self.direction = direction_of(self.direction)
        self.step = step_policy(self.step)

    @classmethod
    def pgd(
        cls,
        attack_loss: Loss,
        constraint: Constraint,
        steps: int,
        step: float,
        start: Anchor | str = "uniform",
        direction: Direction | str = "sign",
        mode: Mode = "eval",
    ) -> Linearized:
        """``steps`` projected steps of length ``step`` from ``start``: the last is the closed form, around the anchor
        that the ones before it reach. Raises :class:`InputError` where there are none."""
        if steps < 1:
            raise InputError(f"steps is {steps}; PGD takes at least 1")
        anchor = start if steps == 1 else Steps(anchor_policy(start), direction, count=steps - 1)
        return cls(attack_loss, constraint, anchor, direction, step, mode)

    def objective(self, model: nn.Module, batch: Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        """g ``[B]``, differentiable in θ and δ.

        An adaptive step is computed as a solve at this anchor would, without keeping it; ``held(solution).objective``
        is the g that ``solution`` came from.
        """
        with attack_mode(model, self.mode):
            gradient = self.attack_gradient(model, batch, anchor, create_graph=True)
        step = step_policy(self.step).size(batch, gradient.detach(), remember=False)
        moved = (delta - anchor).flatten(1)
        return (direction_of(self.direction)(gradient).flatten(1) * moved).sum(1) + moved.square().sum(1) / (2 * step)

    def solve(
        self,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Solution:
        """δ* in closed form. What policies remember is updated only where they drew the anchor themselves."""
        return self._solve(model, batch, anchor, generator)[0]

    def _solve(
        self,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None,
        generator: torch.Generator | None,
        create_graph: bool = False,
    ) -> tuple[Solution, Tensor]:
        with attack_mode(model, self.mode):
            seen = self.prepare(model, batch)
            z = self.draw_anchor(model, seen, generator) if anchor is None else anchor.detach()
            gradient = self.attack_gradient(model, batch if create_graph else seen, z, create_graph)
        step = step_policy(self.step).size(batch, gradient.detach(), remember=anchor is None)
        direction = direction_of(self.direction)(gradient)
        delta = self.constraint.project(z - per_sample(step, z) * direction.detach(), batch.x).detach()
        if anchor is None:
            self.policy().remember(batch, delta)
        taken = gradient.detach()
        clean = taken if anchor is None and isinstance(self.policy(), Zero) else None
        return Solution(delta, z, batch, 1 / step, step, attack_gradient=taken, clean_gradient=clean), direction

    @torch.enable_grad()
    def solve_differentiable(
        self,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
        at: CrossAt = "anchor",
    ) -> Solution:
        """:meth:`solve`, keeping the graph of the gradient it took at z instead of computing it again.

        ``at="solution"`` takes the cross derivative at δ* instead, as equation 13 of the Fast-BAT paper writes it;
        for this g that is an approximation.
        """
        steady = direction_of(self.direction).piecewise_constant
        exact = at == "anchor" and not steady
        solution, direction = self._solve(model, batch, anchor, generator, create_graph=exact)
        pull = per_sample(solution.lam, solution.delta) * (solution.delta - solution.anchor)
        solution.gradient = direction + pull
        if at == "solution" and not steady:
            with attack_mode(model, self.mode):
                moved = direction_of(self.direction)(
                    self.attack_gradient(model, batch, solution.delta, create_graph=True)
                )
            # The value stays ∇_δ g at δ*; only its derivative in θ is the other one.
            solution.gradient = solution.gradient.detach() + moved - moved.detach()
        return solution

    def step_size(self) -> float | None:
        policy = step_policy(self.step)
        return policy.value if isinstance(policy, Constant) and not isinstance(policy.value, Tensor) else None

    def proximal_weight(self) -> float:
        step = self.step_size()
        return 0.0 if step is None else 1 / step

    def held(self, solution: Solution) -> LowerProblem:
        """The same problem with the steps that ``solution`` was made with, whatever gradients say now."""
        assert solution.step is not None
        return replace(self, step=Constant(solution.step))

    def set_epoch(self, epoch: int, epochs: int) -> None:
        super().set_epoch(epoch, epochs)
        step_policy(self.step).set_epoch(epoch, epochs)

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": super().state_dict(), "step": step_policy(self.step).state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["anchor"])
        step_policy(self.step).load_state_dict(state["step"])


@dataclass(eq=False)
class Proximal(LowerProblem):
    """The attacker's loss itself, pulled towards an anchor, solved by projected gradient descent.

        g(θ, δ; z) = ℓ_atk(θ, δ) + λ/2 ‖δ − z‖²

    attack_loss: ℓ_atk(model, batch, delta) -> ``[B]``, minimised. constraint: C(x).
    lam: λ > 0; where λ exceeds −λ_min(∇²ℓ_atk), g is strongly convex and δ* unique.
    anchor: z, a policy or its name. tol: on max |δ − P_C(δ − ∇g/λ)|, by default eps^¾ of the dtype.
    max_iter: steps allowed; :class:`~bilevel_at.ConvergenceError` names the samples that need more.
    mode: 'train' or 'eval', the mode in which attack passes see the model.

    Raises :class:`InputError` where λ or tol is not positive. With λ → 0 this is the attacker of equation 3 of the
    Fast-BAT paper; its hypergradient is Proposition 1's with the true Hessian.
    """

    attack_loss: Loss = field()  # no default, although the base class has one
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
        self.anchor = anchor_policy(self.anchor)

    def objective(self, model: nn.Module, batch: Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        """g = ℓ_atk(θ, δ) + λ/2 ‖δ − z‖², ``[B]``."""
        with attack_mode(model, self.mode):
            loss = self.attack_loss(model, batch, delta)
        return loss + self.lam / 2 * (delta - anchor).flatten(1).square().sum(1)

    def proximal_weight(self) -> float:
        return self.lam

    def step_size(self) -> float | None:
        return 1 / self.lam
