"""hypertorch (github.com/prolearner/hypertorch), imported as ``hypergrad``: implicit differentiation of fixed points.

It takes a map whose fixed point is δ*; here the projected gradient step δ ↦ P_C(δ − α∇_δ g) with α = 1/‖H‖.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .installed import module_of
from .method import ITERATIONS, TERMS, Library, Method, Missing, TorchProblem
from .problems import Array, Problem
from .sets import Everywhere, InBall, InBox, InPolyhedron
from .tally import Tally

__all__ = ["library"]

HOW = (
    "it is not on PyPI, where hypertorch and hypergrad are other projects: "
    "pip install --no-deps git+https://github.com/prolearner/hypertorch"
)


def library() -> Library:
    """hypertorch.

    Raises:
        Missing: where it is not installed, or another project's ``hypergrad`` is.
    """
    module = module_of("hypergrad.hypergradients", HOW)
    if not hasattr(module, "CG_normaleq"):
        raise Missing(f"not installed (hypergrad is another project's); {HOW}")

    def methods(problem: Problem) -> Sequence[Method]:
        if isinstance(problem.feasible, Everywhere):
            return [
                Method("CG", _with(module.CG, 1e-100), "iterations", ITERATIONS),
                Method("fixed_point", _with(module.fixed_point, 1e-16), "iterations", TERMS),
            ]
        return [
            Method("CG_normaleq", _with(module.CG_normaleq, 1e-100), "iterations", ITERATIONS),
            Method("fixed_point", _with(module.fixed_point, 1e-16), "iterations", TERMS),
        ]

    return Library("hypertorch", {"hypertorch": _version(module.__file__)}, methods)


def _version(file: str | None) -> str:
    """The distribution says 0.01 at every commit, so that the source's hash tells more."""
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else "unknown"
    return f"of which hypergradients.py has the SHA-256 {digest}…"


def _with(function: Callable[..., Any], tol: float) -> Callable[[Problem, Any, Tally], Array]:
    def hypergradient(problem: Problem, iterations: Any, tally: Tally) -> Array:
        given = TorchProblem(problem, tally)
        project = _projection(problem)

        def step(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
            (gradient,) = torch.autograd.grad(given.lower(hparams[0], params[0]), params, create_graph=True)
            return [project(params[0] - problem.step * gradient)]

        theta = given.theta.requires_grad_()
        gradient: Tensor = function(
            [given.delta], [theta], int(iterations), step, lambda w, h: given.upper(h[0], w[0]), tol=tol, set_grad=False
        )[0]
        return gradient.detach().numpy()

    return hypergradient


def _projection(problem: Problem) -> Callable[[Tensor], Tensor]:
    """P_C as torch differentiates it, near the fixed point: a polyhedron's is that onto the faces that bind there."""
    feasible = problem.feasible
    if isinstance(feasible, InBox):
        radius = feasible.radius
        return lambda u: u.clamp(-radius, radius)
    if isinstance(feasible, InBall):
        radius = feasible.radius
        return lambda u: u * (radius / u.norm()).clamp(max=1)
    if isinstance(feasible, InPolyhedron):
        binding = abs(feasible.G @ problem.delta - feasible.h) < 1e-9
        G, h = torch.from_numpy(feasible.G[binding]), torch.from_numpy(feasible.h[binding])
        return lambda u: u - G.T @ torch.linalg.solve(G @ G.T, G @ u - h)
    return lambda u: u
