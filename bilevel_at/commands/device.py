"""``--device``."""

from __future__ import annotations

import torch

from .. import shares
from ..errors import InputError
from .processes import local_rank

__all__ = ["resolve_device"]


def resolve_device(name: str) -> torch.device:
    """The device of a name: cpu, cuda, cuda:N, mps, or auto, which is a GPU if there is one.

    Of several processes on a machine, each has a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and shares.count() > 1:
        gpus = torch.cuda.device_count()
        if name != "cuda" or local_rank() >= gpus:
            raise InputError(
                f"--device {name} cannot be used here: each process of a job has a GPU of its own (--device cuda), and "
                f"this machine has {gpus} for process {local_rank()}; --device cpu needs none"
            )
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
