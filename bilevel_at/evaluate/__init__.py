"""Robust accuracy. An attack is a lower problem; evaluation solves it and counts unchanged correct predictions."""

from __future__ import annotations

from .attacks import ATTACKS, Attack, attack_from_name
from .checks import check
from .evaluation import EvaluationWarning, evaluate
from .radius import radius_text
from .result import Evaluation, Finding, Score
from .robust import Trace, attack_examples, robust_correct
from .stages import Stage
from .threat import Threat, ball, norm_of, set_name

__all__ = [
    "ATTACKS",
    "Attack",
    "Evaluation",
    "EvaluationWarning",
    "Finding",
    "Score",
    "Stage",
    "Threat",
    "Trace",
    "attack_examples",
    "attack_from_name",
    "ball",
    "check",
    "evaluate",
    "norm_of",
    "radius_text",
    "robust_correct",
    "set_name",
]
