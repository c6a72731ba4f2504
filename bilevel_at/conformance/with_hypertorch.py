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

TINY = 1e-100
"""No residual meets it before it is 0."""

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
        # CG takes the Jacobian of the map for symmetric, which that of a projected step is not.
        name = "CG" if isinstance(problem.feasible, Everywhere) else "CG_normaleq"
        conjugate_gradients = getattr(module, name)
        return [
            Method(name, _with(conjugate_gradients, TINY), "iterations", ITERATIONS),
            Method(f"{name}, as it comes", _with(conjugate_gradients, None), settings=ITERATIONS[-1:], exact=False,
                   note="where the residual meets its tolerance of 1e-10 it returns the iterate before, which is 0 if "
                   "the first step does; the row above has that tolerance at 1e-100"),
            Method("fixed_point", _with(module.fixed_point, 1e-16), "iterations", TERMS),
        ]  # fmt: skip

    return Library("hypertorch", {"hypertorch": _version(module.__file__)}, methods)


def _version(file: str | None) -> str:
    """The distribution says 0.01 at every commit, so that the source's hash tells more."""
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else "unknown"
    return f"without a version (hypergradients.py: SHA-256 {digest}…)"


def _with(function: Callable[..., Any], tol: float | None) -> Callable[[Problem, Any, Tally], Array]:
    def hypergradient(problem: Problem, iterations: Any, tally: Tally) -> Array:
        given = TorchProblem(problem, tally)
        project = _projection(problem)

        def step(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
            (gradient,) = torch.autograd.grad(given.lower(hparams[0], params[0]), params, create_graph=True)
            return [project(params[0] - problem.step * gradient)]

        theta, options = given.theta.requires_grad_(), {} if tol is None else {"tol": tol}
        gradient: Tensor = function(
            [given.delta],
            [theta],
            int(iterations),
            step,
            lambda w, h: given.upper(h[0], w[0]),
            set_grad=False,
            **options,
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
