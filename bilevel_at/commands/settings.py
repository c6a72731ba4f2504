"""The settings of a solver by name, as ``config.json`` has them, and what they are where they are not given."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from ..directions import Direction
from ..evaluate.radius import radius_text
from ..policy import Policy, Schedule
from ..problem import LowerProblem
from ..solver import Solver
from ..steps import Constant

__all__ = ["defaults_of", "lower_settings", "settings_of", "solver_defaults"]

LOWER = ("anchor", "direction", "step", "mode")  # attributes that the lower problems of this library have


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


def lower_settings(lower: LowerProblem) -> dict[str, Any]:
    """The lower problem's name, and its anchor, direction, step and mode where it has them: in words, or numbers."""
    known = {name: getattr(lower, name) for name in LOWER if getattr(lower, name, None) is not None}
    return {"name": type(lower).__name__} | {name: _words(value) for name, value in known.items()}


def _words(value: Any) -> Any:
    """A number or a name as it is; an object by its class, and the arguments that differ from their defaults."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, Direction):
        return value.name
    if isinstance(value, Constant):
        return _words(value.value)
    if not dataclasses.is_dataclass(value) or isinstance(value, (type, Schedule)):
        return type(value).__name__
    parts = []
    for field in dataclasses.fields(value):
        own = getattr(value, field.name, None)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.init and field.repr and not callable(own) and _words(own) != _words(default):
            shown = _words(own)
            parts.append(f"{field.name}={radius_text(shown) if isinstance(shown, float) else shown}")
        elif isinstance(own, (Direction, Policy)):
            parts.append(f"{field.name}={_words(own)}")
    return f"{type(value).__name__}({', '.join(parts)})" if parts else type(value).__name__


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
