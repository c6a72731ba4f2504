"""What ``python -m bilevel_at.evaluate`` is pointed at: a run, or the weights of a named network from elsewhere."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ImageSet
from ..errors import InputError
from ..models import ActivationName, Normalized, build_model
from ..runs.checkpoints import load_tensors
from ..runs.directory import RunDir
from ..runs.model_files import ModelFiles
from ..runs.networks import Which

__all__ = ["Target", "from_checkpoint", "from_run"]

PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, and of torch.compile
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")


@dataclass
class Target:
    """Networks by name (best, last, last_good, or model), where their results go, and what is known of them.

    data, data_dir, test_examples: the images of a run. norm, epsilon: its constraint, None where that is not a ball.
    files: the problem files that define networks, as far as the user has named them.
    """

    run: RunDir
    names: list[str]
    about: Mapping[str, Any]
    data: str = "digits"
    data_dir: str = "data"
    test_examples: int | None = None
    norm: str | None = None
    epsilon: float | None = None
    network: nn.Module | None = None
    files: ModelFiles = field(default_factory=ModelFiles)

    def check(self) -> None:
        """Raise :class:`InputError` where the network is one of a problem file that was not named."""
        if self.network is None:
            self.files.network(self.run.path, self.about)

    def model(self, name: str) -> nn.Module:
        """The network, in eval mode. Raises :class:`InputError` where the checkpoint is not usable."""
        if self.network is not None:
            return self.network
        which: Any = name
        return self.files.load(self.run.path, which)


def from_run(path: Path, which: tuple[Which, ...] | None, files: ModelFiles) -> Target:
    """The networks of a run; :class:`InputError` where it is not one, or has no such checkpoint.

    files: the problem files that define networks, as far as the user has named them.
    """
    run = RunDir(path)
    config = run.read_json("config.json")
    try:
        options = config["options"]
        data, data_dir, examples = options["data"], options.get("data_dir", "data"), options.get("test_examples")
        constraint = config.get("constraint") or {"norm": "linf", "epsilon": config["problem"].get("epsilon")}
        norm, epsilon = constraint["norm"], constraint["epsilon"]
    except (AttributeError, KeyError, TypeError):
        raise InputError(f"{path}/config.json is not one of bilevel_at.run") from None
    there: list[str] = [name for name in ("best", "last", "last_good") if (run.path / f"{name}.pt").exists()]
    if not there:
        raise InputError(f"{path} has no checkpoint yet; bilevel_at.run writes one after its first epoch")
    missing = [name for name in which or () if name not in there]
    if missing:
        raise InputError(f"{path} has no {missing[0]}.pt; it has {', '.join(f'{name}.pt' for name in there)}")
    return Target(run, list(which or there), config, data, data_dir, examples, norm, epsilon, files=files)


def from_checkpoint(
    path: Path,
    images: ImageSet,
    model: str,
    activation: ActivationName,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    out: Path,
    about: Mapping[str, Any],
) -> Target:
    """The network ``model`` with the weights in ``path``: a state_dict, alone or in a dictionary, tensors only.

    The weights are those of our network, which normalises its inputs itself, or of the network inside it; then ``mean``
    and ``std`` say how. Raises :class:`InputError` where they do not fit, and for a file that holds anything but
    tensors and plain values, which is not unpickled.
    """
    found = load_tensors(path)
    state = _state_dict(found)
    if not state:
        raise InputError(f"{path} holds {type(found).__name__} without a state_dict; save model.state_dict()")
    network = build_model(model, images.shape, images.classes, activation=activation)
    assert isinstance(network, Normalized)
    whole = {"mean", "std"} <= state.keys()
    if whole and (mean or std):
        raise InputError(f"{path} says itself how inputs are normalised; leave out --mean and --std")
    if not whole:
        if mean is None or std is None:
            raise InputError(f"{path} does not say how inputs are normalised; give --mean and --std (0 and 1 for none)")
        for name, values in (("mean", mean), ("std", std)):
            state[name] = _channels(name, values, images.shape[0])
        state = {k if k in ("mean", "std") else f"network.{k}": v for k, v in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        said = " ".join(" ".join(str(error).splitlines()[1:]).split()) or str(error)
        raise InputError(f"{path} does not fit the model {model} for {images.shape} images: {said[:200]}") from None
    record = {**about, "model": model, "activation": activation, "checkpoint": str(path.resolve()), **_here(images)}
    return Target(RunDir(out), ["model"], record, network=network.eval())


def _state_dict(found: Any) -> dict[str, Tensor]:
    """The tensors by name in what was loaded, without the prefixes that wrappers add; empty where there are none."""
    for _ in range(5):  # a dictionary may contain itself
        inside = [found[key] for key in WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)]
        found = inside[0] if inside else found
    if not isinstance(found, Mapping):
        return {}
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    while prefix := next((p for p in PREFIXES if state and all(k.startswith(p) for k in state)), ""):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _channels(name: str, values: tuple[float, ...], channels: int) -> Tensor:
    if len(values) not in (1, channels) or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        raise InputError(f"--{name} is {values}; it must be {channels} numbers, or one for all channels")
    return torch.tensor(values).expand(channels).reshape(-1, 1, 1).clone()


def _here(images: ImageSet) -> dict[str, Any]:
    return {
        "shape": list(images.shape),
        "classes": images.classes,
        "evaluated": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
