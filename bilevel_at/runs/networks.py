"""Load the trained network of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..errors import InputError, reason
from ..models import build_model
from .checkpoints import weights
from .described import described
from .directory import RunDir
from .shared import is_shared, load_shared

__all__ = ["Which", "described", "load", "load_weights", "untrained"]

Which = Literal["best", "last", "last_good"]


def load(run_dir: str | Path, which: Which = "best", model: nn.Module | None = None) -> nn.Module:
    """The model of a run, in eval mode. It maps images in [0, 1] to logits, as RobustBench and AutoAttack expect.

    Args:
        run_dir: the run directory; or a ``.safetensors`` file of weights to share, or "digits-fastbat", a trained
            network that this package has.
        which: "best" (by held-out robust accuracy), "last", or "last_good", the epoch before catastrophic overfitting,
            if that happened.
        model: the network to load the weights into; required only if the run's problem file defines its own network.

    Raises:
        InputError: if the directory is not a run, or the checkpoint is missing, damaged, or does not fit the network.
    """
    if which not in get_args(Which):
        raise InputError(f"which is {which!r}; choose 'best', 'last' or 'last_good'")
    if is_shared(run_dir):
        if which != "best":
            raise InputError(f"{run_dir} is one network; which={which!r} is for runs")
        return load_shared(run_dir, model)
    place = Path(run_dir)
    if place.is_file():
        raise InputError(
            f"{place} is a file, and no run: weights of a network of your own are loaded by "
            "model.load_state_dict(torch.load(FILE, weights_only=True))"
        )
    if not place.exists():
        raise InputError(f"there is no run {place}: no such place")
    run = RunDir(run_dir)
    config = run.config()
    model = untrained(run_dir, config) if model is None else model
    load_weights(model, run, which, described(run_dir, config)[0])
    return model.eval()


def untrained(run: str | Path, config: Any) -> nn.Module:
    """The network that a ``config.json`` names, with new weights.

    Args:
        run: the directory, for messages.
        config: the content of ``config.json``.

    Raises:
        InputError: if the configuration describes no network, or the run's problem file defines it.
    """
    name, shape, classes = described(run, config)
    if name == "file":
        raise InputError(
            f"{run} trained the model defined in {str(config.get('file'))[:100]!r}; pass one as load(..., model=...)"
        )
    activation: Any = str(config.get("activation", "relu"))
    with torch.random.fork_rng(devices=[]):  # weights are drawn
        return build_model(name, shape, classes, activation=activation)


def load_weights(model: nn.Module, run: RunDir, which: str, name: str, device: torch.device | str = "cpu") -> None:
    """Load the weights of a checkpoint into a network.

    Args:
        model: the network.
        run: the directory.
        which: the checkpoint's name.
        name: the network's name, for messages.
        device: where tensors are loaded to.

    Raises:
        InputError: where the checkpoint is missing or damaged, or does not fit the network.
    """
    state = run.checkpoint(which, device, memories=False)
    try:
        model.load_state_dict(weights(state))
    except Exception as error:  # what is no state_dict fails in many ways
        raise InputError(f"{which}.pt does not fit the model {name}: {reason(error)}") from None
