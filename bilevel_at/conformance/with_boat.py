"""BOAT (boat-torch): the gradient that its Problem returns, for a lower level that stands at δ*.

It has no constraints in these operations, so that it takes the unconstrained problems alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .installed import module_of, version
from .method import ITERATIONS, TERMS, Library, Method, TorchProblem
from .problems import Array, Problem
from .sets import Everywhere
from .tally import Tally

__all__ = ["library", "lower_loss", "upper_loss"]

HOW = "pip install --no-deps boat-torch higher (with its dependencies it brings numpy below 2)"


def library() -> Library:
    """BOAT.

    Raises:
        Missing: where it is not installed.
    """
    boat = module_of("boat_torch", HOW)

    def methods(problem: Problem) -> Sequence[Method]:
        if not isinstance(problem.feasible, Everywhere):
            return []

        def of(name: str) -> Callable[[Problem, Any, Tally], Array]:
            return lambda problem, k, tally: _gradient(boat, problem, name, int(k), tally)

        note = "its tolerance is set to 1e-100, because it too returns the iterate before the one that meets it"
        return [Method("CG", of("CG"), "iterations", ITERATIONS, note=note), Method("NS", of("NS"), "terms", TERMS)]

    return Library(
        "BOAT", {"boat-torch": version("boat-torch"), "higher": version("higher")}, methods, "no constraints"
    )


class _Weights(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self) -> Tensor:
        return self.values


def lower_loss(data: Any, upper: Any, lower: Any, params: Any = None, **more: Any) -> Tensor:
    """g, as BOAT calls it: by name, with the data, both models, and weights for the lower one."""
    given: TorchProblem = data["given"]
    return given.lower(upper.values, lower(params=params) if params is not None else lower())


def upper_loss(data: Any, upper: Any, lower: Any, params: Any = None, **more: Any) -> Tensor:
    """f, likewise."""
    given: TorchProblem = data["given"]
    return given.upper(upper.values, lower(params=params) if params is not None else lower())


def _gradient(boat: Any, problem: Problem, operation: str, iterations: int, tally: Tally) -> Array:
    """One iteration with one step of the lower level, whose rate α = 1/‖H‖ is that of the map that it inverts."""
    given = TorchProblem(problem, tally)
    lower, upper = _Weights(given.delta), _Weights(given.theta)
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "fo_op": None,
            "gm_op": ["NGD"],
            "na_op": [operation],
            "lower_level_model": lower,
            "upper_level_model": upper,
            "lower_level_var": list(lower.parameters()),
            "upper_level_var": list(upper.parameters()),
            "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=problem.step),
            "upper_level_opt": torch.optim.SGD(upper.parameters(), lr=0.0),
            "lower_iters": 1,
            "device": "cpu",
            "CG": {"tolerance": 1e-100, "k": iterations},
            "GDA": {"alpha_init": 0.0, "alpha_decay": 0.5},
            "RGT": {"truncate_iter": 0},
            "FD": {"r": 1e-2},
            "accumulate_grad": False,
            "copy_last_param": False,
            "return_grad": True,
            "loss_log_path": str(Path(folder) / "losses.json"),
        }
        losses = {
            "lower_level_loss": {"function": f"{__name__}.lower_loss", "params": {}},
            "upper_level_loss": {"function": f"{__name__}.upper_loss", "params": {}},
        }
        run = boat.Problem(config, losses)
        run.build_ll_solver().build_ul_solver()
        gradients, _ = run.run_iter({"given": given}, {"given": given}, current_iter=0)
    gradient: Tensor = gradients[0]
    return gradient.numpy()
