"""JAXopt: implicit differentiation of roots, in float64.

Unconstrained: ``custom_root`` of ∇_δ g. Constrained: ``ProjectedGradient``, and ``custom_root`` of its optimality
function with a linear solver of one's own, because ProjectedGradient of 0.8.5 does not pass its
``implicit_diff_solve`` on (``projected_gradient.py``: the inner ProximalGradient is made without it). Polyhedra:
``OSQP``, because ``solve_normal_cg`` cannot transpose ``projection_polyhedron`` (JAX raises NotImplementedError).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .installed import module_of, version
from .method import Library, Method
from .problems import Array, Problem
from .sets import Everywhere, InBall, InBox, InPolyhedron
from .tally import Tally

__all__ = ["library"]

HOW = "pip install jaxopt jax (JAX for CPUs is enough)"
TIGHT = (1e-2, 1e-4, 1e-6, 1e-8, 1e-11, 1e-14)


def library() -> Library:
    """JAXopt.

    Raises:
        Missing: where it is not installed.
    """
    jax, jaxopt = module_of("jax", HOW), module_of("jaxopt", HOW)
    solvers = module_of("jaxopt.linear_solve", HOW)
    use = _In(jax, jaxopt)

    def methods(problem: Problem) -> Sequence[Method]:
        if isinstance(problem.feasible, Everywhere):
            return [
                Method("custom_root, as it comes", use.by(solvers.solve_normal_cg), exact=False,
                       note="solve_normal_cg with a tolerance of 1e-5"),
                Method("custom_root, solve_cg", use.by(solvers.solve_cg), "tol", TIGHT),
                Method("custom_root, solve_normal_cg", use.by(solvers.solve_normal_cg), "tol", TIGHT),
            ]  # fmt: skip
        if type(problem.feasible) is InPolyhedron:
            return [
                Method("OSQP, as it comes", use.osqp(solvers.solve_normal_cg), exact=False,
                       note="its tolerance for δ* is 1e-3, and the solver's 1e-5"),
                Method("OSQP(tol=1e-12), solve_normal_cg", use.osqp(solvers.solve_normal_cg, 1e-12), "tol",
                       (1e-6, 1e-14)),
            ]  # fmt: skip
        return [
            Method("ProjectedGradient, as it comes", use.projected_gradient(solvers.solve_normal_cg), exact=False,
                   note="solve_normal_cg with a tolerance of 1e-5"),
            Method("custom_root of its optimality, solve_normal_cg", use.by(solvers.solve_normal_cg), "tol", TIGHT),
            Method("custom_root of its optimality, solve_gmres", use.by(solvers.solve_gmres), "tol", TIGHT),
        ]  # fmt: skip

    return Library("JAXopt", {"jaxopt": version("jaxopt"), "jax": version("jax")}, methods)


class _In:
    """One problem at a time in JAX."""

    def __init__(self, jax: Any, jaxopt: Any) -> None:
        self.jax, self.jaxopt = jax, jaxopt

    def by(self, linear_solver: Callable[..., Any]) -> Callable[[Problem, Any, Tally], Array]:
        """``custom_root`` with this linear solver, to a relative tolerance; 0 leaves the solver's own."""

        def hypergradient(problem: Problem, tol: Any, tally: Tally) -> Array:
            options = {"tol": float(tol)} if tol else {}

            def solve(matvec: Callable[[Any], Any], b: Any) -> Any:
                return linear_solver(self._counted(matvec, b, tally), b, **options)

            def differentiable(arrays: dict[str, Any], delta: Any) -> Callable[[Any], Any]:
                root = self.jaxopt.implicit_diff.custom_root(self._optimality(problem, arrays), solve=solve)
                run = root(lambda init, theta: delta)
                return lambda theta: run(None, theta)

            return self._gradient(problem, differentiable, tally)

        return hypergradient

    def projected_gradient(self, default: Callable[..., Any]) -> Callable[[Problem, Any, Tally], Array]:
        """``ProjectedGradient.run`` from δ*. Its products are those of the same linear solver in ``custom_root``."""

        def hypergradient(problem: Problem, _: Any, tally: Tally) -> Array:
            self.by(default)(problem, 0, tally)

            def differentiable(arrays: dict[str, Any], delta: Any) -> Callable[[Any], Any]:
                solver, limits = self._solver(problem, arrays)
                return lambda theta: solver.run(delta, limits, theta).params

            return self._gradient(problem, differentiable, Tally())

        return hypergradient

    def osqp(
        self, linear_solver: Callable[..., Any], tol: float | None = None
    ) -> Callable[[Problem, Any, Tally], Array]:
        """``OSQP`` on g itself, a quadratic program, solved to ``tol`` (None: its own) and then differentiated."""

        def hypergradient(problem: Problem, linear_tol: Any, tally: Tally) -> Array:
            options = {"tol": float(linear_tol)} if linear_tol else {}

            def solve(matvec: Callable[[Any], Any], b: Any) -> Any:
                return linear_solver(self._counted(matvec, b, tally), b, **options)

            own = {} if tol is None else {"tol": tol, "maxiter": 100_000}

            def differentiable(a: dict[str, Any], delta: Any) -> Callable[[Any], Any]:
                solver = self.jaxopt.OSQP(implicit_diff_solve=solve, **own)
                faces = self._faces(problem)
                return lambda theta: (
                    solver.run(params_obj=(a["A"], -(a["B"] @ theta + a["c"])), params_ineq=faces).params.primal
                )

            return self._gradient(problem, differentiable, tally)

        return hypergradient

    def _faces(self, problem: Problem) -> tuple[Any, Any]:
        assert isinstance(problem.feasible, InPolyhedron)
        return self.jax.numpy.asarray(problem.feasible.G), self.jax.numpy.asarray(problem.feasible.h)

    def _gradient(self, problem: Problem, differentiable: Any, tally: Tally) -> Array:
        """dF/dθ where θ ↦ δ* is what ``differentiable`` makes; the derivative of the optimality in θ is a product."""
        jax = self.jax
        with _float64(jax):
            arrays = {name: jax.numpy.asarray(array) for name, array in problem.arrays.items()}
            run = differentiable(arrays, jax.numpy.asarray(problem.delta))
            gradient = jax.grad(lambda theta: problem.upper(jax.numpy, arrays, theta, run(theta)))(
                jax.numpy.asarray(problem.theta)
            )
            result = np.asarray(jax.block_until_ready(gradient))
            jax.effects_barrier()
        tally.products += 1
        return result

    def _optimality(self, problem: Problem, arrays: dict[str, Any]) -> Callable[[Any, Any], Any]:
        """The function of (δ, θ) that is zero at δ*."""
        if isinstance(problem.feasible, Everywhere):
            return self.jax.grad(lambda delta, theta: problem.lower(self.jax.numpy, arrays, theta, delta))
        solver, limits = self._solver(problem, arrays)
        return lambda delta, theta: solver.optimality_fun(delta, limits, theta)

    def _solver(self, problem: Problem, arrays: dict[str, Any]) -> tuple[Any, Any]:
        """(ProjectedGradient, the hyperparameters of its projection)."""
        jaxopt, feasible = self.jaxopt, problem.feasible

        def lower(delta: Any, theta: Any) -> Any:
            return problem.lower(self.jax.numpy, arrays, theta, delta)

        limits: Any
        if isinstance(feasible, InBox):
            projection, limits = jaxopt.projection.projection_box, (-feasible.radius, feasible.radius)
        elif isinstance(feasible, InBall):
            projection, limits = jaxopt.projection.projection_l2_ball, feasible.radius
        else:
            raise NotImplementedError(type(feasible).__name__)
        return jaxopt.ProjectedGradient(lower, projection, stepsize=problem.step), limits

    def _counted(self, matvec: Callable[[Any], Any], like: Any, tally: Tally) -> Callable[[Any], Any]:
        """``matvec``, counting itself and its transpose each time that it runs."""
        jax = self.jax

        def count() -> None:
            tally.products += 1

        def forward(_: Any, u: Any) -> Any:
            jax.debug.callback(count)
            return matvec(u)

        def backward(_: Any, u: Any) -> Any:
            jax.debug.callback(count)
            return jax.linear_transpose(matvec, like)(u)[0]

        return lambda u: jax.custom_derivatives.linear_call(forward, backward, (), u)


def _float64(jax: Any) -> Any:
    """A context in which JAX has float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return module_of("jax.experimental", HOW).enable_x64()  # before JAX 0.8
