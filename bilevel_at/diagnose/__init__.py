"""Why a figure is what it is: measurements of a network, of its training, and of the attacks on it.

Each function returns numbers; :mod:`bilevel_at.figures` draws them.
"""

from __future__ import annotations

from ..runs.history import History, read_history
from .alignment import gradient_alignment
from .cost import StepCost, estimate
from .coupling import Coupling, compare_solvers, kkt_angle, kkt_direction
from .filters import alignment_by_filter, filter_norms, laplace_similarity, without_filter
from .landscape import Landscape, loss_landscape
from .overfitting import RobustOverfitting, best_last_gap
from .perturbations import Perturbations, perturbation_sizes
from .random_step import RandomStepNorms, lemma_1, random_step_norm
from .samples import Deciles, average_gradient_norm, deciles
from .words import Part, describe

__all__ = [
    "Coupling",
    "Deciles",
    "History",
    "Landscape",
    "Part",
    "Perturbations",
    "RandomStepNorms",
    "RobustOverfitting",
    "StepCost",
    "alignment_by_filter",
    "average_gradient_norm",
    "best_last_gap",
    "compare_solvers",
    "deciles",
    "describe",
    "estimate",
    "filter_norms",
    "gradient_alignment",
    "kkt_angle",
    "kkt_direction",
    "laplace_similarity",
    "lemma_1",
    "loss_landscape",
    "perturbation_sizes",
    "random_step_norm",
    "read_history",
    "without_filter",
]
