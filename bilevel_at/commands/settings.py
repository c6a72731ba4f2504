"""The settings of a solver by name, as ``config.json`` has them, and what they are where they are not given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..solver import Solver

__all__ = ["defaults_of", "settings_of", "solver_defaults"]


def settings_of(solver: Solver) -> dict[str, Any]:
    """The solver's name and the arguments it keeps as attributes; those of a wrapped solver by ``inner_FIELD``.

    Other attributes are what it has learnt.
    """
    settings: dict[str, Any] = {"name": type(solver).__name__}
    takes = inspect.signature(type(solver)).parameters
    for name, value in vars(solver).items():
        if name not in takes:
            continue
        if isinstance(value, Solver):
            wrapped = settings_of(value)
            settings[name] = wrapped.pop("name")
            settings |= {f"{name}_{field}": setting for field, setting in wrapped.items()}
        else:
            settings[name] = value
    return settings


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that have a default, and what it is."""
    parameters = inspect.signature(function).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def solver_defaults(solver: Solver) -> dict[str, Any]:
    """The defaults of the names that :func:`settings_of` gives."""
    defaults = defaults_of(type(solver))
    for name, part in vars(solver).items():
        if isinstance(part, Solver):
            defaults |= {f"{name}_{field}": value for field, value in solver_defaults(part).items()}
    return defaults
