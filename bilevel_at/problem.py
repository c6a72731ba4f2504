"""The two players: what each wants, where the attacker may move, and what the network is to withstand.

    min_θ  mean_i f(θ, δ*_i(θ))    subject to    δ*_i(θ) ∈ argmin_{δ ∈ C(x_i)} g(θ, δ; z_i)

f is the upper (defender's) loss, g the lower (attacker's) objective, z an anchor that g may depend on.
Source: Fast-BAT paper (Zhang et al., 2022), equations 2, 3 and 8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import descent, policy, shares
from .anchors import Anchor, anchor_policy
from .batch import Batch, on_host
from .constraints import Constraint
from .draws import difference
from .errors import InputError
from .losses import AnyLoss, as_loss, check_prepared, cross_entropy
from .modes import Mode, attack_mode, full_precision, no_graph
from .policy import Composite, Policy
from .solution import Hypergradient, Solution
from .twice import gradient_with_graph

__all__ = ["BilevelProblem", "CurvedPart", "LowerProblem", "UpperProblem", "solve_by_descent"]

CurvedPart = Callable[[Batch, Tensor, Tensor], Tensor]
"""ℓ(batch, delta, anchor) -> ``[B]`` or one number: the part of g whose Hessian in δ has to be computed."""


class UpperProblem(Policy):
    """The defender: f(θ, δ). Pass a loss, or override :meth:`loss_at`.

    Args:
        criterion: ``(model, batch, delta) -> [B]``, a :class:`~bilevel_at.Loss` or a plain function.
    """

    criterion: AnyLoss

    def __init__(self, criterion: AnyLoss = cross_entropy) -> None:
        self.criterion = criterion

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Batch:
        """The batch as :meth:`loss_at` sees it. Called before the attack, with gradients, in the network's own mode."""
        criterion = getattr(self, "criterion", None)
        return batch if criterion is None else as_loss(criterion).prepare(model, batch, generator)

    def loss_at(
        self, model: nn.Module, batch: Batch, solution: Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        """f at the lower level's solution, whose mean the solver minimises.

        Args:
            model: the network.
            batch: the batch, prepared.
            solution: δ*, and what else the lower level hands on: its anchor, its batch, a shared output.
            generator: for whatever is drawn at random.

        Returns:
            ``[B]``, or one number where the samples of the batch are coupled.
        """
        return self.criterion(model, batch, solution.delta)


class LowerProblem(Policy):
    """The attacker: δ* ∈ argmin_{δ ∈ C(x)} g(θ, δ; z).

    A subclass needs a ``constraint`` and :meth:`objective`; it is then solved by projected gradient descent to
    tolerance, which suits a smooth strongly convex g. Closed forms override :meth:`solve_at`.

    Attributes, set on the class or on an object:

    constraint: C(x).
    anchor: the policy that draws z where none is given, or its name; "zero" if there is none.
    mode: 'train' or 'eval', the mode in which attack passes see the model; 'eval' if there is none.
    attack_loss: ℓ_atk, where g is built from one: anchors that take steps and ``FullKKT(curvature="attack")`` need it.
        A plain function as a class attribute has to be a ``staticmethod``.
    """

    # No values here: a dataclass would take an inherited value for the default of its own field of that name.
    constraint: Constraint
    anchor: Anchor | str
    mode: Mode
    attack_loss: AnyLoss

    def base(self, model: nn.Module, batch: Batch) -> Tensor:
        """What δ is added to: it gives δ its shape, and the constraint its x.

        A leading axis of 1 is one δ, shared by the whole batch. The constraint must not depend on θ through it.
        """
        return batch.x

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Batch:
        """The batch as attack passes see it: by default, as the attack loss prepares it."""
        loss = getattr(self, "attack_loss", None)
        return batch if loss is None else as_loss(loss).prepare(model, batch, generator)

    def objective(self, model: nn.Module, batch: Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        """g(θ, δ; z), minimised: ``[B]``, or one number. Called in the mode of attack passes, with a prepared batch."""
        raise NotImplementedError(f"{type(self).__name__} does not define objective(model, batch, delta, anchor)")

    def solve_at(self, model: nn.Module, batch: Batch, anchor: Tensor, differentiable: bool) -> Solution:
        """δ* from the anchor; the one method to override for another way of solving. Must change nothing.

        Args:
            model: the network, in the mode of attack passes.
            batch: the batch, prepared.
            anchor: z, detached.
            differentiable: whether ``solution.gradient``, ∇_δ g(θ, δ*; z) with its graph in θ, is wanted. Leave it
                None where δ* has no derivative in θ; KKT solvers then refuse the problem. A gradient without a graph
                says that the derivative is zero.
        """
        return solve_by_descent(self, model, batch, anchor, differentiable)

    def solve(
        self,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
        differentiable: bool = False,
    ) -> Solution:
        """δ*, and the anchor it was solved from. Changes nothing but the network's own buffers; not to be overridden.

        Args:
            model: the network; its mode is restored.
            batch: the examples.
            anchor: z, to hold it fixed; drawn by the anchor policy if not given.
            generator: for whatever is drawn at random.
            differentiable: keep ``solution.gradient`` with its graph in θ.

        Raises:
            InputError: for an unknown mode or anchor, for inputs that the constraint, a loss or a policy refuses (their
                values are looked at on a CPU alone).
            ConvergenceError: where an iterative solve does not reach its tolerance, naming the samples.
        """
        with torch.enable_grad(), attack_mode(model, attack_mode_of(self)):
            # What is prepared is differentiated again too, or is set against passes that are: KL(f(x) ‖ f(x + δ)).
            with full_precision(batch.x.device) if differentiable else no_graph():
                seen = check_prepared(self, self.prepare(model, batch, generator))
            memo, drawn, base = None, anchor is None, self.base(model, seen)
            check_base(self, base)
            check_rows(base, seen)
            if anchor is None:
                anchor, memo = anchor_policy(getattr(self, "anchor", "zero")).draw(self, model, seen, generator)
            _check_anchor(anchor, base, batch)
            solution = self.solve_at(model, seen, anchor.detach(), differentiable)
        return replace(solution, delta=solution.delta.detach(), memo=memo, drawn=drawn)

    def change(self, model: nn.Module, solution: Solution, before: Tensor, after: Tensor) -> Tensor:
        """Σ_i g(θ, after; z) − g(θ, before; z), for its gradient in θ: what solvers without double backward need.

        A g that has input gradients of the network in it overrides this where first-order passes give the same
        gradient up to third order in ``after − before``. The passes that are subtracted make the same random draws
        (dropout in train mode), or their difference would be noise.

        Args:
            model: the network, in the mode of attack passes.
            solution: of a differentiable solve: its batch, anchor and λ are those of g.
            before, after: two perturbations, shaped like δ*.
        """
        return difference(lambda d: self.objective(model, solution.batch, d, solution.anchor), before, after)

    def curvature(self, model: nn.Module, solution: Solution) -> tuple[CurvedPart | None, Tensor | float]:
        """(ℓ, λ) such that ∇²_δδ g = ∇²_δδ ℓ + λI; None for ℓ where the Hessian is λI."""
        return lambda batch, delta, anchor: self.objective(model, batch, delta, anchor), 0.0


def check_rows(base: Tensor, batch: Batch) -> None:
    """Raise :class:`InputError` where examples that several processes share have one δ."""
    if shares.count() > 1 and len(base) < len(batch):
        raise InputError(
            f"{len(batch)} examples have {len(base)} δ, which several processes would each have of their own; start it "
            "without torchrun"
        )


def check_base(lower: LowerProblem, base: Tensor) -> None:
    """Raise :class:`InputError` where the constraint does not take ``base``, which is looked at where that is free."""
    constraint = getattr(lower, "constraint", None)
    if constraint is not None and on_host(base):
        constraint.check(base)


def _check_anchor(anchor: Tensor, base: Tensor, batch: Batch) -> None:
    """Raise :class:`InputError` unless z has a row for each row of what δ is added to, or for each example."""
    if base.ndim < 2 or len(base) == 0:
        raise InputError(f"δ is added to a tensor of shape {tuple(base.shape)}; it must be [B, ...] with B above 0")
    if anchor.shape[1:] != base.shape[1:] or len(anchor) not in (len(base), len(batch)):
        raise InputError(f"the anchor has shape {tuple(anchor.shape)}; δ needs {tuple(base.shape)}")


def base_at(lower: LowerProblem, model: nn.Module, batch: Batch) -> Tensor:
    """:meth:`LowerProblem.base` as attack passes see it: in their mode, without a graph."""
    if type(lower).base is LowerProblem.base:
        return batch.x
    with torch.no_grad(), attack_mode(model, attack_mode_of(lower)):
        return lower.base(model, batch)


def attack_mode_of(lower: LowerProblem) -> Mode:
    """The mode in which the lower problem's passes see the model."""
    mode: Mode = getattr(lower, "mode", "eval")
    return mode


def solve_by_descent(
    lower: LowerProblem,
    model: nn.Module,
    batch: Batch,
    anchor: Tensor,
    differentiable: bool,
    *,
    lam: float = 0.0,
    tol: float | None = None,
    max_iter: int = 10_000,
) -> Solution:
    """Minimise ``lower.objective`` over the constraint by projected gradient descent from the anchor.

    Args:
        lower, model, batch, anchor, differentiable: as :meth:`LowerProblem.solve_at` has them.
        lam: λ, the weight of a proximal term in g; 0 where there is none.
        tol: on max |δ − P_C(δ − ∇g/λ)| (λ = 1 where it is 0); None is eps^¾ of the dtype, 6e-6 in float32.
        max_iter: steps allowed.

    Raises:
        ConvergenceError: where ``tol`` is not reached in ``max_iter`` steps, naming the samples.
    """
    with torch.no_grad():
        base = lower.base(model, batch)
    delta, residual = descent.projected_gradient(
        lambda d: lower.objective(model, batch, d, anchor),
        lower.constraint.project(anchor, base),
        lambda d: lower.constraint.project(d, base),
        tol=tol,
        max_iter=max_iter,
        scale=1 / lam if lam else 1.0,
    )
    gradient = objective_gradient(lower, model, batch, delta, anchor) if differentiable else None
    return Solution(delta, anchor, batch, lam=lam, gradient=gradient, residual=residual)


def objective_gradient(lower: LowerProblem, model: nn.Module, batch: Batch, delta: Tensor, anchor: Tensor) -> Tensor:
    """∇_δ g(θ, δ; z), shaped like δ, with its graph in θ; in full precision under autocast too."""
    with torch.enable_grad(), full_precision(delta.device):
        delta = delta.detach().requires_grad_()
        values = lower.objective(model, batch, delta, anchor)
        gradient = gradient_with_graph(values.sum(), delta, retain_graph=False)
    if gradient is None:
        raise InputError(f"{type(lower).__name__}'s objective does not depend on δ, so that it has no gradient there")
    return gradient


def _give_own_anchor(lower: LowerProblem) -> None:
    """Make a named anchor an object, once, so that it can remember, and a class's anchor this object's own."""
    anchor, of_class = getattr(lower, "anchor", None), getattr(type(lower), "anchor", None)
    if isinstance(anchor, str) and not isinstance(of_class, property):
        object.__setattr__(lower, "anchor", anchor_policy(anchor))  # a frozen dataclass is a problem too
    elif isinstance(anchor, Anchor) and anchor is of_class:
        object.__setattr__(lower, "anchor", copy.deepcopy(anchor))


class BilevelProblem(Composite):
    """An upper and a lower problem, and what the network is to withstand. A solver says how the two are coupled.

    Args:
        upper: the defender.
        lower: the attacker of training, whose perturbations are in ``lower.constraint``.
        threat: the set that the network is to withstand: what evaluation attacks, what the best epoch is chosen by,
            and whose radius is printed. ``lower.constraint`` if not given.
    """

    def __init__(self, upper: UpperProblem, lower: LowerProblem, threat: Constraint | None = None) -> None:
        for player, kind in ((upper, UpperProblem), (lower, LowerProblem)):
            if not isinstance(player, kind):
                raise InputError(f"BilevelProblem(upper, lower): {player!r:.60} is not an object of {kind.__name__}")
        for place, space in (("threat", threat), ("lower.constraint", getattr(lower, "constraint", None))):
            if space is not None and not isinstance(space, Constraint):
                raise InputError(f"{place} is {space!r:.60}; it must be a Constraint, such as LinfBall(8/255)")
        self.upper, self.lower, self._threat = upper, lower, threat
        _give_own_anchor(lower)

    @property
    def threat(self) -> Constraint:
        """The set that the network is to withstand.

        Raises:
            InputError: where neither the problem nor its lower problem has one.
        """
        threat = self._threat if self._threat is not None else getattr(self.lower, "constraint", None)
        if threat is None:
            raise InputError(
                f"{type(self.lower).__name__} has no constraint; pass BilevelProblem(upper, lower, threat=...)"
            )
        return threat

    def observe(self, step: Hypergradient) -> None:
        """Let everything that remembers observe a training step; ``backward`` does."""
        policy.observe(self, step)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Say that epoch ``epoch`` of ``epochs`` (from 0) begins; warm-ups, schedules and resets follow it."""
        policy.set_epoch(self, epoch, epochs)

    def set_step(self, step: int, steps: int) -> None:
        """Say that update ``step`` of all ``steps`` (from 0) is next, for schedules that change with every update."""
        policy.set_step(self, step, steps)

    def state_dict(self) -> dict[str, Any]:
        """What outlives a batch, by path: tensors and plain values only."""
        return policy.state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; on resuming, after :meth:`set_epoch`."""
        policy.load_state(self, state)

    def __repr__(self) -> str:
        threat = "" if self._threat is None else f", threat={self._threat!r}"
        return f"BilevelProblem({type(self.upper).__name__}, {self.lower!r}{threat})"
