"""Checkpoints: tensors and plain values, of which nothing is ever unpickled that could run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["FORMAT", "checked", "load_tensors", "weights"]

FORMAT = 2
"""What a checkpoint holds: 1 had no number, and what problems remember was laid out in another way."""


def weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights to evaluate in a checkpoint: their moving average where there is one. KeyError where it has none."""
    tensors = (state["average"] if "average" in state else state["model"]) if isinstance(state, dict) else None
    if not isinstance(tensors, dict):
        raise KeyError("model")
    return tensors


def checked(file: Path, content: Any) -> dict[str, Any]:
    """The content of a checkpoint; :class:`InputError` where it is of another format, older or newer."""
    number = content.get("format", 1) if isinstance(content, dict) else None
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError(f"{file} is not a checkpoint of bilevel_at.run")
    if number != FORMAT:
        age, remedy = ("older", "train again") if number < FORMAT else ("newer", "install that one")
        raise InputError(
            f"{file} has checkpoint format {number}, of a bilevel-at that is {age}; this one reads format {FORMAT}; "
            f"{remedy}"
        )
    return dict(content)


def load_tensors(file: Path, device: torch.device | str = "cpu") -> Any:
    """What ``torch.save`` wrote, if that is tensors and plain values; otherwise :class:`InputError`: nothing runs."""
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        reason = "it is damaged, or holds something else, which is not unpickled because that can run code"
    except Exception as error:  # damaged files fail in many ways, all of them inside torch.load
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise InputError(f"{file} is not a checkpoint of tensors that can be loaded: {reason[:160]}")
