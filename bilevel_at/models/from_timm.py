"""Networks of timm by its names, ``timm:resnet18``: untrained, and imported when one is asked for."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from torch import nn

from ..errors import InputError, reason
from .activations import Activation, replace_relu

__all__ = ["PREFIX", "timm_network"]

PREFIX = "timm:"


def timm_network(name: str, shape: tuple[int, int, int], classes: int, activation: Activation = nn.ReLU) -> nn.Module:
    """timm's network ``name`` for images of ``shape`` (C, H, W), with new weights; nothing is downloaded.

    Images come normalised by the caller. Vision transformers get ``shape``'s height and width as their ``img_size``.
    Attention is not fused: fused kernels have no second derivative, and solvers with an implicit term need it.

    Args:
        name: as ``timm.list_models()`` has it, without a tag, which would name weights.
        shape: of an image.
        classes: the number of outputs.
        activation: stands where the network has ``nn.ReLU``; other activations are left as they are.

    Raises:
        InputError: where timm is not installed, has no such network, or cannot build it for such images.
    """
    try:
        timm: Any = import_module("timm")
    except ImportError as error:
        if error.name != "timm":
            raise
        raise InputError(f"the model {PREFIX}{name} is of timm, which is not installed: pip install timm") from None
    network = _built(timm, name, shape, classes)
    attentions: list[Any] = [module for module in network.modules() if hasattr(module, "fused_attn")]
    for attention in attentions:
        attention.fused_attn = False
    if activation is not nn.ReLU and not replace_relu(network, activation):
        raise InputError(f"the model {PREFIX}{name} has no ReLU that --activation could replace; leave it out")
    return network


def _built(timm: Any, name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    _check_name(timm, name)
    options = {"pretrained": False, "in_chans": shape[0], "num_classes": classes}
    try:
        try:
            network: nn.Module = timm.create_model(name, img_size=shape[1:], **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            network = timm.create_model(name, **options)  # of a network that takes images of any size
    except Exception as error:  # each network refuses what it cannot be in its own way
        raise InputError(
            f"timm cannot build {name} for images of {shape} in {classes} classes: {reason(error)[:200]}"
        ) from error
    return network


def _check_name(timm: Any, name: str) -> None:
    known, tag = name.partition(".")[0], name.partition(".")[2]
    if not timm.is_model(known):
        near = difflib.get_close_matches(known, timm.list_models(), 3)
        like = f"; near it are {', '.join(PREFIX + n for n in near)}" if near else "; timm.list_models() has the names"
        raise InputError(f"timm {timm.__version__} has no model {name!r}{like}")
    if tag:
        raise InputError(
            f"{PREFIX}{name} names trained weights, which are not downloaded; {PREFIX}{known} is the network without "
            "them (docs/neighbours.md says how to start from trained ones)"
        )
