"""The implicit term now and then, and so much larger."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bilevel_at.batch import Batch
from bilevel_at.draws import host_uniform
from bilevel_at.errors import InputError, positive
from bilevel_at.problem import BilevelProblem
from bilevel_at.solution import Hypergradient
from bilevel_at.solver import Solver

from .zero_ig import ZeroIG

__all__ = ["Lazy"]


@dataclass
class Lazy(Solver):
    """With probability p the implicit term of another solver, times 1/p; else none: unbiased, given θ and the draws.

    A batch without the term keeps no graph of the attack and makes no double backward: Fast-BAT then costs 7 passes
    instead of 11, 7 + 4p on average. The variance of the implicit term grows by (1/p − 1) times its square.

    The coin is the first draw from ``generator``, before anything that the problem draws. With p = 1 none is drawn, and
    every step is bit for bit the inner solver's.

    Args:
        inner: the solver whose implicit term it is.
        p: the probability, above 0 and at most 1.

    Raises:
        InputError: where p is out of range, ``inner`` has no implicit term of its own (ZeroIG, cross_at="merged"), or
            does more than add one (a ``hypergradient`` or ``backward`` of its own).
    """

    inner: Solver
    p: float = 0.25

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Solver):
            raise InputError(f"inner is {self.inner!r:.60}; it must be a solver, such as HessianFreeKKT()")
        if not self.inner.implicit:
            raise InputError(f"{type(self.inner).__name__} has no implicit term, so there is nothing to leave out")
        if getattr(self.inner, "cross_at", None) == "merged":
            raise InputError('cross_at="merged" has no implicit term apart; use "anchor" or "solution" within Lazy')
        kind = type(self.inner)
        own = [name for name in ("hypergradient", "backward") if getattr(kind, name) is not getattr(Solver, name)]
        if own and kind is not Lazy:
            raise InputError(
                f"{kind.__name__} has a {own[0]} of its own, which steps without the term would leave out; Lazy wraps "
                "solvers that differ from ZeroIG in the implicit term alone"
            )
        if positive("p", self.p) > 1:
            raise InputError(f"p is {self.p:g}; it must be above 0 and at most 1")
        self._without = ZeroIG()

    def compile(self, backend: str = "inductor") -> None:
        """Compile the steps with and without the term; the coin is tossed outside."""
        self.inner.compile(backend)
        self._without.compile(backend)

    def mixture(self) -> list[tuple[float, Solver]]:
        """The inner solver with probability p, and :class:`ZeroIG`."""
        inner = [(self.p * share, solver) for share, solver in self.inner.mixture()]
        return inner if self.p == 1 else [*inner, (1 - self.p, ZeroIG())]

    def hypergradient(
        self,
        problem: BilevelProblem,
        model: nn.Module,
        batch: Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        scale: float = 1.0,
    ) -> Hypergradient:
        """The inner solver's with its implicit term divided by p, or :class:`ZeroIG`'s."""
        if self.p == 1:
            return self.inner.hypergradient(problem, model, batch, anchor, generator, scale=scale)
        if host_uniform(generator) >= self.p:
            return self._without.hypergradient(problem, model, batch, anchor, generator, scale=scale)
        step = self.inner.hypergradient(problem, model, batch, anchor, generator, scale=scale)
        larger = {name: None if g is None else g / self.p for name, g in step.implicit.items()}
        return replace(step, implicit=larger)
