"""The network that a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError

__all__ = ["described"]


def described(run: str | Path, config: Any) -> tuple[str, tuple[int, int, int], int]:
    """The network that a ``config.json`` describes.

    Args:
        run: the directory, for messages.
        config: the content of ``config.json``.

    Returns:
        The network's name, the shape (C, H, W) of its inputs, and the number of classes.

    Raises:
        InputError: if the configuration describes no network.
    """
    try:
        name, (channels, height, width), classes = config["model"], config["shape"], config["classes"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{run}/config.json is not one of bilevel_at.run") from None
    sizes = (channels, height, width, classes)
    if not isinstance(name, str) or not all(type(size) is int and size > 0 for size in sizes):
        raise InputError(
            f"{run}/config.json is not one of bilevel_at.run: model, shape and classes describe no network"
        )
    return name, (channels, height, width), classes
