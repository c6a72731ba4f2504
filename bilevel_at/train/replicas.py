"""Several processes that train one network: each has a part of a step, and all have the same network after it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import distributed, policy, shares
from ..batch_statistics import SyncBatchNorm
from ..data import Loader
from ..division import agree
from ..errors import InputError
from ..memory import SampleMemory
from ..modes import attack_mode, same_buffers
from .finite import size

__all__ = ["Reducer", "check_replicas", "check_single_rows", "check_states", "remembers_by_example"]


def remembers_by_example(root: Any) -> bool:
    """Whether a policy of ``root`` has a memory by example, so that examples, and not places, are dealt out.

    Raises:
        InputError: where another has one by position, among several processes.
    """
    parts = [part for one in policy.policies(root).values() for part in vars(one).values()]
    kinds = {part.by for part in parts if isinstance(part, SampleMemory)}
    if len(kinds) > 1 and shares.count() > 1:
        raise InputError(
            "this problem remembers by example and by position; several processes divide the one or the other: start "
            "it without torchrun"
        )
    return "example" in kinds


class Reducer:
    """Adds up what the processes have of a step.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._used: dict[str, nn.Parameter] | None = None

    def start_epoch(self) -> None:
        """Ask anew which parameters have gradients: one that has none on any process stays as it is."""
        self._used = None

    def add_up(self, examples: int) -> None:
        """The gradient of the whole batch on every process, and one value of local batch statistics.

        Args:
            examples: of this process, in the update.

        Raises:
            InputError: where a parameter has a gradient that had none when the epoch began.
        """
        if shares.count() == 1:
            return
        named = dict(self.model.named_parameters())
        here = {name for name, p in named.items() if p.grad is not None}
        if self._used is None:
            of_any = set().union(*shares.gathered(here))
            self._used = {name: p for name, p in named.items() if name in of_any}
        if new := here - self._used.keys():
            raise InputError(f"{min(new)} has a gradient, and had none when the epoch began; start it without torchrun")
        distributed.sum_gradients(self._used, group=shares.group())
        distributed.average_statistics(self.model, examples, shares.group())


def check_replicas(model: nn.Module) -> None:
    """Raise :class:`InputError` where the processes' weights are not the same."""
    if shares.count() > 1:
        agree("the network that is trained (the sum of its weights' norms)", size(model).item())


def check_single_rows(model: nn.Module, loader: Loader, by_index: bool) -> None:
    """Raise :class:`InputError` where the network has no batch statistics of one row, and a process may have one."""
    normalises = any(isinstance(m, _BatchNorm) and not isinstance(m, SyncBatchNorm) for m in model.modules())
    if shares.count() == 1 or not normalises or not (by_index or loader.smallest // shares.count() < 2):
        return
    x = loader.images[slice(0, 1)].pixels()
    try:
        with torch.no_grad(), attack_mode(model, "train"), same_buffers(model), torch.random.fork_rng(devices=[]):
            model(x)
    except ValueError as error:
        raise InputError(
            f"a process may have one example of a batch, of which the network has no batch statistics ({error}); "
            "use --sync-batch-norm, fewer processes or a larger --batch-size"
        ) from None


def check_states(state: Mapping[str, Any]) -> None:
    """Check that what the players remember is the same on every process, where it is not divided.

    Raises:
        InputError: where it is not, naming the policy.
    """
    if shares.count() == 1:
        return
    here = {path: _digest(value) for name in ("problem", "solver") for path, value in _leaves(state[name], name)}
    first, *others = shares.gathered(here)
    for rank, other in enumerate(others, 1):
        for path, digest in other.items():
            if first.get(path) != digest:
                if shares.rank() > 0:
                    raise shares.Elsewhere(f"{path} differs")
                raise InputError(
                    f"{path} is not the same on process {rank} as on the first: what is remembered by example belongs "
                    "in a ba.SampleMemory, and draws for a batch's rows are made by bilevel_at.draws.rand"
                )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What is there, by path; a memory is None on all processes but the first."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{path}/{name}")
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from _leaves(part, f"{path}/{place}")
    elif value is not None:
        yield path, value


def _digest(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes()
        return hashlib.sha256(value).hexdigest()
    return repr(value)
