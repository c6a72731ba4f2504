"""The provenance in a record: versions, machine, date, and the fingerprint of a network."""

from __future__ import annotations

import datetime
import hashlib
import platform
from importlib import metadata
from typing import Any

import torch
from torch import nn

__all__ = ["device_name", "fingerprint", "machine", "today", "versions"]


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, PyTorch, this library, and further packages by the names of their distributions."""
    installed = {name: metadata.version(name) for name in ("bilevel-at", *packages)}
    return {"python": platform.python_version(), "torch": str(torch.__version__), **installed}


def today() -> str:
    """The date, ``2026-01-02``."""
    return datetime.date.today().isoformat()


def machine(device: torch.device) -> dict[str, Any]:
    """The platform, the number of threads and the device, on which measured times depend."""
    return {"platform": platform.platform(), "threads": torch.get_num_threads(), "device": device_name(device)}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def fingerprint(model: nn.Module) -> str:
    """The first 16 digits of a SHA-256 of the network's layers, and of its weights and buffers with their names."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
