"""bilevel-at: adversarial training as bilevel optimisation.

A problem says what each player wants and where it may move; a solver says how the players are coupled; the trainer
only repeats.
"""

from __future__ import annotations

from pathlib import Path as _Path

from . import testing
from .anchors import Anchor, Corner, Gaussian, Remembered, Steps, Uniform, Zero
from .batch import Batch, CropFlip
from .constraints import ActiveSet, Constraint, L2Ball, LinfBall, Polyhedron
from .directions import Direction
from .errors import BilevelError, ConvergenceError, CurvatureError, InputError
from .losses import Loss, cross_entropy, kl_divergence, logits, margins, minus, negative_margin
from .lower import Linearized, Proximal
from .memory import SampleMemory
from .modes import attack_mode
from .problem import BilevelProblem, LowerProblem, Solution, UpperProblem
from .runs.networks import load
from .solver import Hypergradient, KKTSolver, Solver
from .steps import Adaptive, Constant, Step
from .targeted import Targeted

__version__ = "0.1.0"

__all__ = [
    "ActiveSet",
    "Adaptive",
    "Anchor",
    "Batch",
    "BilevelError",
    "BilevelProblem",
    "Constant",
    "Constraint",
    "ConvergenceError",
    "Corner",
    "CropFlip",
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
    "Polyhedron",
    "Proximal",
    "Remembered",
    "SampleMemory",
    "Solution",
    "Solver",
    "Step",
    "Steps",
    "Targeted",
    "Uniform",
    "UpperProblem",
    "Zero",
    "attack_mode",
    "cross_entropy",
    "kl_divergence",
    "load",
    "logits",
    "margins",
    "minus",
    "negative_margin",
    "testing",
]

# In a checkout, problems/ and solvers/ are beside this folder. Searching there makes them this checkout's own, even where
# another checkout is installed. In an installed package they are inside this folder, and nothing is added.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "solvers" / "full_kkt.py").is_file():
    __path__.append(str(_checkout))
