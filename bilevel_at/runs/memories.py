"""What policies remember, apart from the weights: a file of tensors that is named by their content.

ATAS on the 45,000 training images of CIFAR-10 remembers 0.55 GB of perturbations, the network and its momentum are
0.09 GB; what did not change since the last checkpoint is not written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["apart", "name_of", "joined"]

REMEMBERED = ("problem", "solver")
MARK = "in the memories"


def apart(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state with a mark for each tensor that the problem and the solver remember, and these tensors by path."""
    tensors: dict[str, Tensor] = {}

    def marked(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            path = f"{len(tensors)}:{path}"  # numbered, because a key may have a slash in it
            tensors[path] = value.detach()
            return {MARK: path}
        if isinstance(value, dict):
            return {key: marked(part, f"{path}/{key}") for key, part in value.items()}
        if type(value) in (list, tuple):
            return type(value)(marked(part, f"{path}/{i}") for i, part in enumerate(value))
        return value

    rest = {key: marked(part, key) if key in REMEMBERED else part for key, part in state.items()}
    return rest, tensors


def joined(state: Mapping[str, Any], tensors: Any) -> dict[str, Any]:
    """The state that :func:`apart` has divided.

    Raises:
        InputError: if a tensor is missing.
    """

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {MARK}:
                return tensors[value[MARK]]
            return {key: whole(part) for key, part in value.items()}
        return type(value)(map(whole, value)) if type(value) in (list, tuple) else value

    try:
        return {key: whole(part) if key in REMEMBERED else part for key, part in state.items()}
    except (KeyError, TypeError, RecursionError):
        raise InputError("the memories are not those of this checkpoint: a tensor is missing") from None


def name_of(which: str, tensors: Mapping[str, Tensor]) -> str:
    """The name of the file, from the checkpoint's name and the names, types, shapes and bytes of the tensors."""
    digest = hashlib.sha256()
    for path, tensor in tensors.items():
        digest.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"memory-{which}-{digest.hexdigest()[:16]}.pt"
