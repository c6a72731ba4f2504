"""Betty (betty-ml): the gradient that its Engine gives an upper problem, for a lower problem that stands at δ*.

Betty has no constraints, so that it takes the unconstrained problems alone. Its ``darts`` takes the Hessian for the
identity by design; ``reinforce`` is a stub that returns nothing ("not completely implemented yet") and is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .installed import module_of, version
from .method import ITERATIONS, TERMS, Library, Method, TorchProblem
from .problems import Array, Problem
from .sets import Everywhere
from .tally import Tally

__all__ = ["library"]

HOW = "pip install --no-deps --ignore-requires-python betty-ml==0.2.1 (it declares Python < 3.11, and runs on 3.12)"


def library() -> Library:
    """Betty.

    Raises:
        Missing: where it is not installed.
    """
    modules = [module_of(f"betty.{name}", HOW) for name in ("engine", "configs", "problems")]

    def methods(problem: Problem) -> Sequence[Method]:
        if not isinstance(problem.feasible, Everywhere):
            return []

        def with_config(config: Callable[[Any], dict[str, Any]]) -> Callable[[Problem, Any, Tally], Array]:
            return lambda problem, value, tally: _gradient(modules, problem, config(value), tally)

        alpha = problem.step
        return [
            Method("cg", with_config(lambda k: {"type": "cg", "cg_iterations": k}), "iterations", ITERATIONS,
                   note="0.2.1 makes each new direction from the residual before the last step"),
            Method("neumann", with_config(lambda k: {"type": "neumann", "neumann_iterations": k - 1,
                   "neumann_alpha": alpha}), "terms", TERMS),
            Method("darts", with_config(lambda r: {"type": "darts", "darts_alpha": r}), "darts_alpha", (1e-2, 1e-4),
                   exact=False, note="takes the lower level's Hessian for the identity, and two gradients of g in θ"),
        ]  # fmt: skip

    return Library("Betty", {"betty-ml": version("betty-ml")}, methods, note="no constraints")


class _Weights(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


def _gradient(modules: Sequence[ModuleType], problem: Problem, config: dict[str, Any], tally: Tally) -> Array:
    """One step of an Engine, whose lower problem steps with rate 0, so that it stays at δ*."""
    engine, configs, problems = modules
    given = TorchProblem(problem, tally)
    found: list[Tensor] = []

    class Lower(problems.ImplicitProblem):  # type: ignore[name-defined]  # imported when run
        def training_step(self, batch: Any) -> Tensor:
            return given.lower(self.upper.module.values, self.module.values)

        def get_batch(self) -> None:
            return None

    class Upper(Lower):
        def training_step(self, batch: Any) -> Tensor:
            return given.upper(self.module.values, self.lower.module.values)

        def grad_callback(self) -> None:
            found.append(self.module.values.grad.detach().clone())

    def level(kind: Any, name: str, values: Tensor, **settings: Any) -> Any:
        module = _Weights(values)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        return kind(name, configs.Config(**settings), module, optimizer)

    lower, upper = level(Lower, "lower", given.delta, **config), level(Upper, "upper", given.theta, retain_graph=True)
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)  # it logs each Engine's start and end
    try:
        dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
        settings = configs.EngineConfig(train_iters=1, strategy="cpu")
        engine.Engine([lower, upper], settings, dependencies).run()
    finally:
        logging.disable(disabled)
    return found[0].numpy()
