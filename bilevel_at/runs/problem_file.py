"""A user's file that defines ``problem(...)`` and, optionally, ``solver(...)``, ``recipe()`` and ``model(...)``."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import BilevelError, InputError
from .recipe import DEFAULTS, Recipe, recipe_for

__all__ = ["ProblemFile", "packaged_problems"]

PACKAGED = "bilevel_at.problems"


def packaged_problems() -> list[tuple[Path, str]]:
    """The problem files of this package, each with the first line of its docstring."""
    spec = importlib.util.find_spec(PACKAGED)
    folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else Path()
    files = sorted(f for f in folder.glob("*.py") if not f.stem.startswith("_"))
    return [(f, (ast.get_docstring(ast.parse(f.read_text(encoding="utf-8"))) or "").split("\n")[0]) for f in files]


class ProblemFile:
    """A loaded problem file.

    Args:
        path: the file, or the name of a packaged problem.

    Raises:
        InputError: if the file does not exist, fails to run (the message has the line number), or defines no
            ``problem``.
    """

    def __init__(self, path: str) -> None:
        self.path = self._find(path)
        source = self.path.read_bytes()
        self.sha256 = hashlib.sha256(source).hexdigest()
        self.module = self._import(source)
        if not hasattr(self.module, "problem"):
            raise InputError(f"{path} defines no problem(...); it must, and return a BilevelProblem")
        self.problem: Callable[..., Any] = self._function("problem")
        self.solver = self._function("solver") if hasattr(self.module, "solver") else None
        self.model = self._function("model") if hasattr(self.module, "model") else None

    def _function(self, name: str) -> Callable[..., Any]:
        function = getattr(self.module, name)
        if not inspect.isfunction(function):
            raise InputError(f"{self.path}: {name} is {function!r}; it must be a function")
        return function

    @staticmethod
    def _find(path: str) -> Path:
        """The file, or else the packaged problem of that name (outside a checkout there is no problems/)."""
        given = Path(path)
        if given.is_file():
            return given
        packaged = {path.stem: path for path, _ in packaged_problems()}
        names = sorted(packaged)
        if given.stem in packaged and given.parent in (Path(), Path("problems")):
            return packaged[given.stem]
        close = difflib.get_close_matches(given.stem, names, 1)
        hint = f"did you mean {close[0]}?" if close else f"packaged problems are {', '.join(names)}"
        raise InputError(f"problem file {path} does not exist; {hint}")

    def _import(self, source: bytes) -> ModuleType:
        """Run the source that was hashed, and never cached bytecode."""
        name = f"bilevel_at_problem_file_{self.path.stem}"
        spec = importlib.util.spec_from_file_location(name, self.path)
        if spec is None or spec.loader is None:
            raise InputError(f"{self.path} is not a Python file; a problem file ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # typing.get_type_hints looks up the module by name
        folder = str(self.path.parent.resolve())
        if folder not in sys.path:
            sys.path.append(folder)  # a problem file may import its neighbours
        with self.blame():
            exec(compile(source, str(self.path), "exec", dont_inherit=True), module.__dict__)
        return module

    @contextmanager
    def blame(self, what: str = "") -> Iterator[None]:
        """Convert an exception in the user's code to an InputError of one line, with the line number in their file.

        Args:
            what: words to put before the exception's name.
        """
        try:
            yield
        except (BilevelError, InputError):
            raise
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == self.path.resolve()]
            where = f"{self.path}, line {lines[-1]}" if lines else str(self.path)
            message = " ".join(str(error).split())
            raise InputError(f"{where}: {what}{type(error).__name__}: {message[:300]}") from error

    def recipe(self, data: str) -> Recipe:
        """The file's recipe for a data set, or else the default one, with only those arguments that ``problem`` takes.

        Args:
            data: the data set's name.

        Raises:
            InputError: if ``recipe()`` fails, or does not map names to recipes.
        """
        with self.blame("recipe() failed: "):
            stated: Any = self.module.recipe() if hasattr(self.module, "recipe") else {}
        if not isinstance(stated, Mapping) or not all(isinstance(r, Recipe) for r in stated.values()):
            raise InputError(
                f"{self.path}: recipe() returns {stated!r}; it must map data set names to bilevel_at.train.Recipe"
            )
        if data in stated:
            own: Recipe = stated[data]
            return own
        # A recipe's problem arguments are passed on only if the problem takes them. Those of the default recipe replace
        # no default of the problem: they fill only arguments that have none.
        published = recipe_for(data, stated)
        recipe = published or recipe_for(data, DEFAULTS) or Recipe()
        takes = inspect.signature(self.problem).parameters
        asked = {
            k: v for k, v in recipe.problem.items() if k in takes and (published or takes[k].default is takes[k].empty)
        }
        return dataclasses.replace(recipe, problem=asked)

    def make(self, function: Callable[..., Any], kind: type, /, **arguments: Any) -> Any:
        """Call one of the file's functions, and check the type of the result.

        Args:
            function: the function.
            kind: the type that it must return.
            arguments: keyword arguments of the call.

        Raises:
            InputError: if the call fails or returns another type.
        """
        with self.blame(f"{function.__name__}(...) failed: "):
            made = function(**arguments)
        if not isinstance(made, kind):
            raise InputError(
                f"{self.path}: {function.__name__}(...) returns {type(made).__name__}; it must return a {kind.__name__}"
            )
        return made
