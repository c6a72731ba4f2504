"""A user's file that defines ``problem(...)`` and, if it likes, ``solver(...)``, ``recipe()`` and ``model(...)``."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .errors import InputError
from .problem import BilevelProblem
from .solver import Solver
from .train.recipe import Recipe, default_recipe

__all__ = ["ProblemFile"]

PACKAGED = "bilevel_at.problems"


class ProblemFile:
    """A loaded problem file. Raises :class:`InputError`, with the file's own line where it failed."""

    def __init__(self, path: str) -> None:
        self.path = self._find(path)
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.module = self._import(self.path)
        if not callable(getattr(self.module, "problem", None)):
            raise InputError(f"{path} defines no problem(...); it must, and return a BilevelProblem")
        self.problem: Callable[..., BilevelProblem] = self.module.problem
        self.solver: Callable[..., Solver] | None = getattr(self.module, "solver", None)
        self.model: Callable[..., nn.Module] | None = getattr(self.module, "model", None)

    @staticmethod
    def _find(path: str) -> Path:
        """The file; failing that, the packaged problem of that name (outside a checkout there is no problems/)."""
        given = Path(path)
        if given.is_file():
            return given
        spec = importlib.util.find_spec(PACKAGED)
        folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else Path()
        names = sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_"))
        if given.stem in names and given.parent in (Path(), Path("problems")):
            return folder / f"{given.stem}.py"
        close = difflib.get_close_matches(given.stem, names, 1)
        hint = f"did you mean problems/{close[0]}.py?" if close else f"packaged problems are {', '.join(names)}"
        raise InputError(f"problem file {path} does not exist; {hint}")

    @staticmethod
    def _import(path: Path) -> ModuleType:
        name = f"bilevel_at_problem_file_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise InputError(f"{path} is not a Python file; a problem file ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # typing.get_type_hints looks the module up
        sys.path.insert(0, str(path.parent.resolve()))  # a problem file may import its neighbours
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
            where = f"{path}, line {lines[-1]}" if lines else str(path)
            raise InputError(f"{where}: {type(error).__name__}: {error}") from error
        finally:
            sys.path.pop(0)
        return module

    def recipe(self, data: str) -> Recipe:
        """The file's recipe for this data set, else the default one, with only what ``problem`` takes."""
        stated: Any = self.module.recipe() if hasattr(self.module, "recipe") else {}
        if not isinstance(stated, Mapping) or not all(isinstance(r, Recipe) for r in stated.values()):
            raise InputError(
                f"{self.path}: recipe() returns {stated!r}; it must map data set names to bilevel_at.train.Recipe"
            )
        if data in stated:
            found: Recipe = stated[data]
            return found
        default = default_recipe(data)
        takes = inspect.signature(self.problem).parameters
        kept = {k: v for k, v in default.problem.items() if k in takes and takes[k].default is inspect.Parameter.empty}
        return Recipe(**{**{f: getattr(default, f) for f in default.__dataclass_fields__}, "problem": kept})

    def make(self, function: Callable[..., Any], kind: type, **arguments: Any) -> Any:
        """Call one of the file's functions; a ValueError or TypeError in it is the user's to read in one line."""
        try:
            made = function(**arguments)
        except (ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.path}: {function.__name__}(...) failed: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(made, kind):
            raise InputError(
                f"{self.path}: {function.__name__}(...) returns {type(made).__name__}; it must return a {kind.__name__}"
            )
        return made
