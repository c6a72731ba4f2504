"""Robust accuracy. An attack is a lower problem: evaluation solves it, and looks whether the prediction moved."""

from __future__ import annotations

from .attacks import Attack, attack_from_name
from .robust import Score, evaluate, robust_correct

__all__ = ["Attack", "Score", "attack_from_name", "evaluate", "robust_correct"]
