"""Checkpoints: tensors and plain values, loaded without unpickling anything that could run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import InputError, reason

__all__ = ["FORMAT", "checked", "load_tensors", "weights"]

FORMAT = 3
"""The version of the checkpoint format. Version 1 had no number, and stored the state of policies differently; in
version 2 the memories were in the same file, which is still read."""
READ = (2, 3)


def weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights to evaluate in a checkpoint: their moving average if it has one.

    Raises:
        KeyError: if the checkpoint has no weights.
    """
    tensors = (state["average"] if "average" in state else state["model"]) if isinstance(state, dict) else None
    if not isinstance(tensors, dict):
        raise KeyError("model")
    return tensors


def checked(file: Path, content: Any) -> dict[str, Any]:
    """The content of a checkpoint, after a check of its format version.

    Args:
        file: the path, for messages.
        content: the loaded object.

    Raises:
        InputError: if the content is not a checkpoint, or has an older or newer format.
    """
    number = content.get("format", 1) if isinstance(content, dict) else None
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError(f"{file} is not a checkpoint of bilevel_at.run")
    if number not in READ:
        age, remedy = ("older", "train again") if number < FORMAT else ("newer", "install that one")
        raise InputError(
            f"{file} has checkpoint format {number}, of a bilevel-at that is {age}; this one reads format {FORMAT}; "
            f"{remedy}"
        )
    return dict(content)


def load_tensors(file: Path, device: torch.device | str = "cpu", opened: BinaryIO | None = None) -> Any:
    """Load a file of ``torch.save`` that contains only tensors and plain values. No code from the file is run.

    Args:
        file: the path.
        device: where tensors are loaded to.
        opened: the same file, opened.

    Raises:
        InputError: if the file is damaged or contains anything else.
    """
    try:
        return torch.load(file if opened is None else opened, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        why = "it is damaged, or holds something else, which is not unpickled because that can run code"
    except Exception as error:  # damaged files fail in many ways, all of them inside torch.load
        why = reason(error)
    raise InputError(f"{file} is not a checkpoint of tensors that can be loaded: {why}")
