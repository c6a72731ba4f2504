"""This library's solvers, through its public interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.solvers import FullKKT, HessianFreeKKT, Neumann, ProjectionAdjoint, ValueFunction

from .method import TERMS, TOLERANCES, Library, Method, TorchProblem
from .problems import Array, Problem
from .sets import InBall, InBox, InPolyhedron
from .tally import Tally

__all__ = ["library"]


class _Theta(nn.Module):
    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)


class _Lower(ba.LowerProblem):
    """g, whose solution is given."""

    def __init__(self, given: TorchProblem) -> None:
        self.given, self.constraint = given, _constraint(given.problem)

    def objective(self, model: nn.Module, batch: ba.Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        return self.given.lower(model.theta, delta[0])[None]  # type: ignore[arg-type]  # a Parameter

    def solve_at(self, model: nn.Module, batch: ba.Batch, anchor: Tensor, differentiable: bool) -> ba.Solution:
        delta = self.given.delta[None].requires_grad_()
        value = self.objective(model, batch, delta, anchor).sum()
        (gradient,) = torch.autograd.grad(value, delta, create_graph=differentiable)
        return ba.Solution(delta.detach(), anchor, batch, lam=self.given.problem.lam, gradient=gradient)


def _constraint(problem: Problem) -> ba.Constraint:
    feasible = problem.feasible
    if isinstance(feasible, InBox):
        return ba.LinfBall(feasible.radius, bounds=None)
    if isinstance(feasible, InBall):
        return ba.L2Ball(feasible.radius)
    if isinstance(feasible, InPolyhedron):
        return ba.Polyhedron(torch.from_numpy(feasible.G), torch.from_numpy(feasible.h))
    return ba.Range(bounds=None)


def _with(solver: Callable[[Problem, Any], ba.Solver], count: bool = True) -> Callable[[Problem, Any, Tally], Array]:
    def hypergradient(problem: Problem, value: Any, tally: Tally) -> Array:
        given = TorchProblem(problem, tally if count else None)
        upper = ba.UpperProblem(lambda model, batch, delta: given.upper(model.theta, delta[0])[None])  # type: ignore[arg-type]
        pair = ba.BilevelProblem(upper, _Lower(given))
        batch = ba.Batch(torch.zeros_like(given.delta)[None])
        step = solver(problem, value).hypergradient(pair, _Theta(given.theta), batch)
        gradient = step.grads["theta"]
        assert gradient is not None
        return gradient.numpy()

    return hypergradient


def _dense(problem: Problem, value: Any, tally: Tally) -> Array:
    """The Hessian by torch.func, which does not go through what counts: a product for each of its columns."""
    tally.products += len(problem.delta) + 1
    return _with(lambda problem, _: FullKKT(method="dense"), count=False)(problem, value, tally)


def _methods(problem: Problem) -> Sequence[Method]:
    methods = [
        Method("FullKKT, conjugate gradients", _with(lambda _, tol: FullKKT("cg", tol=tol)), "tol", TOLERANCES),
        Method("FullKKT, dense", _dense),
        Method("Neumann", _with(lambda p, k: Neumann(int(k), p.step)), "terms", TERMS),
        Method(
            "ValueFunction",
            _with(lambda _, s: ValueFunction(s)),
            "s",
            (1e-1, 1e-2, 1e-3, 1e-4),
            exact=False,
            note="first-order passes alone; its error falls as s² until rounding",
        ),
    ]
    if problem.lam:
        methods += [
            Method("HessianFreeKKT", _with(lambda *_: HessianFreeKKT())),
            Method("ProjectionAdjoint", _with(lambda *_: ProjectionAdjoint())),
        ]
    return methods


def library() -> Library:
    """This library."""
    return Library("bilevel-at", {"bilevel-at": ba.__version__, "torch": torch.__version__}, _methods)
