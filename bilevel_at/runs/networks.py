"""The network that a run has trained, from its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ..errors import InputError
from ..models import build_model
from .checkpoints import weights
from .directory import RunDir

__all__ = ["Which", "described", "load"]

Which = Literal["best", "last", "last_good"]


def described(run: str | Path, config: Any) -> tuple[str, tuple[int, int, int], int]:
    """(name, shape, classes) of the network that a ``config.json`` describes; :class:`InputError` where it does not."""
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


def load(run_dir: str | Path, which: Which = "best", model: nn.Module | None = None) -> nn.Module:
    """The model of a run, in eval mode, taking images in [0, 1] to logits, as RobustBench and AutoAttack expect.

    which: "best" (by held-out robust accuracy), "last", or "last_good", the epoch before catastrophic overfitting where
    that happened. model: the network to fill, needed only where the run's problem file defined its own. Raises
    :class:`InputError` where the directory or the checkpoint is not usable.
    """
    if which not in get_args(Which):
        raise InputError(f"which is {which!r}; choose 'best', 'last' or 'last_good'")
    run = RunDir(run_dir)
    config = run.config()
    name, shape, classes = described(run_dir, config)
    if model is None:
        if name == "file":
            raise InputError(
                f"{run_dir} trained the model defined in {str(config.get('file'))[:100]!r}; pass one as "
                "load(..., model=...)"
            )
        model = build_model(name, shape, classes, activation=str(config.get("activation", "relu")))  # type: ignore[arg-type]
    state = run.checkpoint(which)
    try:
        model.load_state_dict(weights(state))
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{which}.pt does not fit the model {name}: {str(error).splitlines()[0]}") from None
    return model.eval()
