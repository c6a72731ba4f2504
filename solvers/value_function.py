"""The implicit term as a difference of two attacked networks' gradients: first-order passes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bilevel_at import descent, shares
from bilevel_at.batch import per_sample
from bilevel_at.draws import Draws
from bilevel_at.errors import ConvergenceError, InputError, at_least, name_samples, positive, whole_number
from bilevel_at.lockstep import largest, smallest
from bilevel_at.modes import attack_mode, full_precision, same_buffers
from bilevel_at.problem import LowerProblem, attack_mode_of, base_at
from bilevel_at.solution import Gradients, Solution
from bilevel_at.solver import Attacked, Solver, Terms

__all__ = ["ValueFunction"]

MOST, SHARE = 0.01, 0.02
"""Of "auto": the most, and a share of λ. 0.01 stands rounding in float32; published Fast-BAT's λ is 0.05: 0.001."""


@dataclass
class ValueFunction(Solver):
    """The implicit term by the envelope theorem, without an adjoint and without double backward.

        F(θ) = d/ds G_s(θ) at s = 0,   G_s(θ) = min_{δ ∈ C} Σ_i g_i(θ, δ_i; z_i) + s f_i(θ, δ_i)

        implicit term = (∇_θ g(θ, δ_s) − ∇_θ g(θ, δ_−s)) / 2s,   δ_±s = argmin_{δ ∈ C} g ± s f

    (F2SA, Kwon et al., 2023; BOME, Liu et al., 2022.) δ_±s are found by projected gradient descent from δ*. The error
    falls as s² for smooth f and g and an active set that the move leaves alone; it serves networks whose operations
    have no second derivative (fused attention, compiled modules), and any g, with the exact Hessian. For a linearised g
    the difference is :meth:`bilevel_at.Linearized.change`, of the same order; on networks with kinks (ReLU) units that
    change their side between the two points add an error that does not fall with s.

    Every step of the two descents is a forward and a backward pass of f, and of g where its Hessian is not λI. f is
    taken with the same random draws every time (dropout too), and the running statistics of batch normalisation end as
    one pass leaves them.

    Args:
        s: weight of f in the perturbed problems, above 0. It has to be small against λ/‖∇²f‖, so that they stay
            convex, and large enough for the difference to be seen: δ_s − δ_−s is about 2s ∇f/λ. "auto" is 0.02 of
            the least λ, and at most 0.01; smaller values suit float64.
        ig_weight: multiplies the implicit term; 1 is the exact hypergradient.
        tol: of the perturbed problems, as for :func:`bilevel_at.solve_by_descent`; None is s · eps^¾ of the dtype, at
            least 16 eps.
        max_iter: steps allowed for each.

    Raises:
        InputError: where s is not positive, and where δ* is not a minimiser of g (a few steps of an optimiser).
        ConvergenceError: where a perturbed problem does not reach ``tol`` in ``max_iter`` steps.
    """

    s: float | Literal["auto"] = "auto"
    ig_weight: float = 1.0
    tol: float | None = None
    max_iter: int = 1000

    first_order = True

    def __post_init__(self) -> None:
        if self.s != "auto":
            positive("s", self.s)
        at_least("ig_weight", self.ig_weight)
        if self.tol is not None:
            positive("tol", self.tol)
        whole_number("max_iter", self.max_iter, 1)

    def compile(self, backend: str = "inductor") -> None:
        raise InputError(
            "no single graph can be compiled of ValueFunction, which descends until it has converged: leave out "
            "--compile (or compile()), or take HessianFreeKKT"
        )

    def differentiate(self, attacked: Attacked) -> Terms:
        """The direct term at δ*, and the difference of ∇_θ g at δ_s and δ_−s."""
        if not attacked.moves:
            return super().differentiate(attacked)
        draws = Draws(attacked.generator, attacked.solution.delta.device)
        losses, direct, v = self.direct_terms(attacked)
        # A difference of passes that are close together: half precision would leave nothing of it.
        with same_buffers(attacked.model), attacked.statistics.again(), full_precision(v.device):
            implicit = self._difference(attacked, draws)
        return Terms(losses, direct, implicit, v)

    def _difference(self, attacked: Attacked, draws: Draws) -> Gradients:
        lower, model, solution = attacked.problem.lower, attacked.model, attacked.solution
        base = base_at(lower, model, solution.batch).detach()
        lower_part = self._lower_part(attacked)
        examples, s = len(attacked.batch), self._weight(solution)
        share = shares.current()

        def perturbed(weight: float) -> Callable[[Tensor], Tensor]:
            def objective(delta: Tensor) -> Tensor:
                with draws.again() as generator, attacked.statistics.again():
                    # Σ_i f_i of the rows here, whether f is per sample or one number for the batch
                    upper = attacked.losses(delta, generator).mean() * examples
                return lower_part(delta).sum() + weight * upper

            return objective

        def project(delta: Tensor) -> Tensor:
            return lower.constraint.project(delta, base)

        eps = torch.finfo(solution.delta.dtype).eps
        tol = max(s * eps**0.75, 16 * eps) if self.tol is None else self.tol
        scale = _scale(solution)
        try:
            below, above = (
                descent.projected_gradient(perturbed(weight), solution.delta, project, tol, self.max_iter, scale)[0]
                for weight in (-s, s)
            )
        except ConvergenceError as error:
            raise ConvergenceError(
                f"g ± s f with s={s:g} was not minimised to tol={tol:g} in max_iter={self.max_iter} steps on "
                f"{name_samples(error.samples)}; a smaller s keeps it convex, or raise tol or max_iter",
                error.samples,
            ) from error
        with attack_mode(model, attack_mode_of(lower)):
            change = lower.change(model, solution, below, above)
        named = attacked.parameters
        factor = self.ig_weight * attacked.scale / (2 * s * shares.size(attacked.batch))
        if share is not None and share.idle:
            factor = 0.0
        cross = torch.autograd.grad(factor * change, list(named.values()), allow_unused=True)
        return dict(zip(named, cross, strict=True))

    def _weight(self, solution: Solution) -> float:
        """s, as a number."""
        if self.s != "auto":
            return self.s
        return min(MOST, SHARE / _scale(solution))

    def _lower_part(self, attacked: Attacked) -> Callable[[Tensor], Tensor]:
        """δ ↦ g up to a constant: by its gradient at δ* and λ where its Hessian is λI, and else as it is written."""
        lower, model, solution = attacked.problem.lower, attacked.model, attacked.solution
        assert attacked.gradient is not None  # a solver with an implicit term is not called without it
        slope = attacked.gradient.detach()
        _check_minimiser(lower, model, solution, slope)
        part, lam = lower.curvature(model, solution)

        def quadratic(delta: Tensor) -> Tensor:
            moved = delta - solution.delta
            return slope * moved + per_sample(lam, moved) / 2 * moved.square()

        def written(delta: Tensor) -> Tensor:
            with attack_mode(model, attack_mode_of(lower)):
                return lower.objective(model, solution.batch, delta, solution.anchor)

        return quadratic if part is None else written


def _scale(solution: Solution) -> float:
    """1/λ, the largest where samples differ; 1 where g has no proximal term."""
    least = smallest(solution.lam.min()).item() if isinstance(solution.lam, Tensor) else solution.lam
    return 1 / least if least > 0 else 1.0


def _check_minimiser(lower: LowerProblem, model: nn.Module, solution: Solution, slope: Tensor) -> None:
    """Raise :class:`InputError` where δ* is not P_C(δ* − ∇g/λ): then δ_s and δ_−s say nothing about it."""
    if solution.residual is not None:  # solved to a tolerance of its own
        return
    delta = solution.delta
    step = torch.zeros(len(delta), dtype=delta.dtype, device=delta.device) + solution.lam
    step = torch.where(step > 0, 1 / step, 1)
    with torch.no_grad():
        base = lower.base(model, solution.batch)
        moved = lower.constraint.project(delta - per_sample(step, delta) * slope, base)
        gap = largest((moved - delta).abs().max()).item()
    if not gap <= torch.finfo(delta.dtype).eps ** 0.5:
        raise InputError(
            f"{type(lower).__name__}'s δ* is not a minimiser of its objective (off by {gap:.2g}), which ValueFunction "
            "needs; use ZeroIG, or a KKT solver"
        )
