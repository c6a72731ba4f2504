"""Weights from elsewhere: a state_dict in a file, for a network known by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ImageSet
from ..errors import InputError
from ..models import ActivationName, Normalized, build_model
from ..runs.checkpoints import load_tensors
from ..runs.shared import SUFFIX, read_shared

__all__ = ["network_with_weights"]

PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, and of torch.compile
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")


def network_with_weights(
    path: Path,
    images: ImageSet,
    model: str,
    activation: ActivationName = "relu",
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> nn.Module:
    """The network ``model`` with the weights in ``path``, in eval mode.

    Args:
        path: a state_dict, alone or in a dictionary. The file may contain only tensors and plain values.
        model: the name of the network.
        images: images of the network's input shape and number of classes.
        activation: the activation function of the network.
        mean: subtracted from each channel, if the weights are of a network that does not normalise its inputs.
        std: the divisor of each channel, likewise.

    Raises:
        InputError: if the weights do not fit, or the file contains anything else.
    """
    content = read_shared(path)[0] if path.suffix == SUFFIX else load_tensors(path)
    state = _state_dict(content)
    if not state:
        raise InputError(f"{path} holds {type(content).__name__} without a state_dict; save model.state_dict()")
    network = build_model(model, images.shape, images.classes, activation=activation)
    assert isinstance(network, Normalized)
    whole = {"mean", "std"} <= state.keys()
    if whole and (mean or std):
        raise InputError(f"{path} says itself how inputs are normalised; leave out --mean and --std")
    if not whole:
        if not mean or not std:
            raise InputError(f"{path} does not say how inputs are normalised; give --mean and --std (0 and 1 for none)")
        for name, values in (("mean", mean), ("std", std)):
            state[name] = _channels(name, values, images.shape[0])
        state = {k if k in ("mean", "std") else f"network.{k}": v for k, v in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(" ".join(str(error).splitlines()[1:]).split()) or str(error)
        raise InputError(f"{path} does not fit the model {model} for {images.shape} images: {reason[:200]}") from None
    return network.eval()


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The tensors of the loaded object by name, without the prefixes of wrappers; empty if there are none."""
    for _ in range(5):  # a dictionary may contain itself
        wrapped = content if isinstance(content, Mapping) else {}
        content = next((wrapped[key] for key in WRAPPERS if isinstance(wrapped.get(key), Mapping)), content)
    if not isinstance(content, Mapping):
        return {}
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    while prefix := next((p for p in PREFIXES if state and all(k.startswith(p) for k in state)), ""):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _channels(name: str, values: tuple[float, ...], channels: int) -> Tensor:
    if len(values) not in (1, channels) or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        raise InputError(f"--{name} is {values}; it must be {channels} numbers, or one for all channels")
    return torch.tensor(values).expand(channels).reshape(-1, 1, 1).clone()
