"""bilevel-at: adversarial training as bilevel optimisation.

A problem says what each player wants, where it may move and what it must withstand; a solver says how the players are
coupled; computing is pure, and one call remembers; the trainer only repeats.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

from .anchors import Anchor, Corner, Gaussian, Remembered, Start, Steps, Uniform, Zero
from .batch import Batch, CropFlip
from .constraints import ActiveSet, Constraint, L2Ball, LinfBall, Range
from .directions import Direction
from .errors import BilevelError, ConvergenceError, CurvatureError, InputError
from .kkt import KKTSolver
from .losses import (
    CrossEntropy,
    Loss,
    cross_entropy,
    input_gradient,
    kl_divergence,
    logits,
    margins,
    minus,
    negative_margin,
)
from .lower import AtAnchor, Linearized, Proximal
from .memory import SampleMemory
from .modes import attack_mode
from .policy import Counter, Policy, Schedule, policies
from .polyhedra import Polyhedron
from .problem import BilevelProblem, LowerProblem, UpperProblem, solve_by_descent
from .solution import Hypergradient, Solution
from .solver import Solver
from .steps import Adaptive, Constant, Step
from .targeted import Targeted

__version__ = "0.1.0"

_ON_DEMAND = {
    "distributed": ("bilevel_at.distributed", None),
    "card": ("bilevel_at.runs.shared", "card"),
    "export": ("bilevel_at.runs.shared", "export"),
    "load": ("bilevel_at.runs", "load"),
    "testing": ("bilevel_at.testing", None),
}
"""What loads more than the language does: imported when it is first asked for."""

__all__ = [
    "ActiveSet",
    "Adaptive",
    "Anchor",
    "AtAnchor",
    "Batch",
    "BilevelError",
    "BilevelProblem",
    "Constant",
    "Constraint",
    "ConvergenceError",
    "Corner",
    "Counter",
    "CropFlip",
    "CrossEntropy",
    "CurvatureError",
    "Direction",
    "Gaussian",
    "Hypergradient",
    "InputError",
    "KKTSolver",
    "L2Ball",
    "Linearized",
    "LinfBall",
    "Loss",
    "LowerProblem",
    "Policy",
    "Polyhedron",
    "Proximal",
    "Range",
    "Remembered",
    "SampleMemory",
    "Schedule",
    "Solution",
    "Solver",
    "Start",
    "Step",
    "Steps",
    "Targeted",
    "Uniform",
    "UpperProblem",
    "Zero",
    "attack_mode",
    "card",
    "cross_entropy",
    "distributed",
    "export",
    "input_gradient",
    "kl_divergence",
    "load",
    "logits",
    "margins",
    "minus",
    "negative_margin",
    "policies",
    "solve_by_descent",
    "testing",
]


def __getattr__(name: str) -> _Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _ON_DEMAND[name]
    loaded = _import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


# In a checkout, problems/ and solvers/ are beside this folder. Searching there makes them this checkout's own, even
# where another is installed. In an installed package they are inside this folder, and nothing is added.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "solvers" / "full_kkt.py").is_file():
    __path__.append(str(_checkout))
