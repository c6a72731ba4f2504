"""A run on disk: its directory, checkpoints, metrics, history, evaluations, recipe and problem file.

Importing this package is light: recipes, which every problem file imports, need none of what reading a network needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .directory import RunDir
    from .networks import load

__all__ = ["RunDir", "load"]

_ON_DEMAND = {"RunDir": "directory", "load": "networks"}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
