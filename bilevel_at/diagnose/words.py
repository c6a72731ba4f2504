"""A problem and its solver in words, read off the objects that they are made of."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..policy import Composite, Schedule
from ..problem import BilevelProblem
from ..solver import Solver

__all__ = ["Part", "describe", "words"]

UPPER = ("criterion",)
LOWER = ("attack_loss", "constraint", "anchor", "direction", "step", "mode")
"""Attributes that are told of a player wherever it has them; others where they have not their default."""


@dataclass(frozen=True)
class Part:
    """role: what it is to the whole, such as "lower.anchor". name: the object. about: what its class says of it."""

    role: str
    name: str
    about: str = ""


def describe(problem: BilevelProblem, solver: Solver) -> list[Part]:
    """The composition: both players with their parts, the threat, and the solver."""
    parts = [*_player("upper", problem.upper, UPPER), *_player("lower", problem.lower, LOWER)]
    try:
        threat = words(problem.threat)
    except InputError:  # there is none
        threat = "none"
    return [*parts, Part("threat", threat), _part("solver", solver)]


def _player(role: str, player: Any, documented: Iterable[str]) -> Iterator[Part]:
    yield Part(role, type(player).__name__, _about(player))
    told = {name: getattr(player, name) for name in documented if hasattr(player, name)}
    for name, value in {**told, **dict(_arguments(player))}.items():
        if value is not None:
            yield _part(f"{role}.{name}", value)


def _part(role: str, value: Any) -> Part:
    return Part(role, words(value), _about(value) if isinstance(value, Composite) else "")


def words(value: Any) -> str:
    """A value as one would write it: numbers to four digits, names, and objects with the arguments that matter.

    Arguments that have their default are left out. A schedule is given by the number that it has now.
    """
    if value is None or isinstance(value, bool | int | str):
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Schedule):
        return f"{value.value:.4g} (scheduled)"
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {words(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(words(part) for part in value) + ")"
    if isinstance(name := getattr(value, "name", None) or getattr(value, "__name__", None), str):
        return name  # directions and functions
    plain: Any = object.__repr__
    if type(value).__repr__ is not plain and not dataclasses.is_dataclass(value):
        written = repr(value)
        if " at 0x" not in written:  # of something that has no words of its own
            return written
    arguments = dict(_arguments(value))
    if list(arguments) == ["value"]:
        return words(arguments["value"])  # a constant
    written = ", ".join(f"{name}={words(part)}" for name, part in arguments.items())
    return f"{type(value).__name__}({written})" if written else type(value).__name__


def _arguments(value: Any) -> Iterator[tuple[str, Any]]:
    """What the object was made with, as far as it keeps it under that name; without what has its default."""
    try:
        parameters = inspect.signature(type(value)).parameters.values()
    except (TypeError, ValueError):
        return
    hidden = {f.name for f in dataclasses.fields(value) if not f.repr} if dataclasses.is_dataclass(value) else set()
    kept = getattr(value, "__dict__", {})
    for parameter in parameters:
        if parameter.name not in kept or parameter.name in hidden:
            continue
        if not _same(kept[parameter.name], parameter.default):
            yield parameter.name, kept[parameter.name]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return bool(one == other)


def _about(value: Any) -> str:
    """The first sentence of its class's docstring, without markup; "" where there is none, or a generated one."""
    text = inspect.cleandoc(type(value).__doc__ or "").split("\n\n")[0]
    if text.startswith(f"{type(value).__name__}("):
        return ""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", " ".join(text.split())).replace("``", "")
    return re.split(r"(?<=[^.])\.(?=\s+[A-Z]|$)", text)[0].rstrip(".")
