"""Which distributions are installed, and how those that are not are had."""

from __future__ import annotations

from importlib import import_module, metadata
from types import ModuleType

from .method import Missing

__all__ = ["module_of", "version"]


def module_of(name: str, how: str) -> ModuleType:
    """The module ``name``.

    Raises:
        Missing: where it or something that it needs cannot be imported, with ``how`` to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise Missing(f"not installed ({error}); {how}") from None


def version(distribution: str) -> str:
    """The installed version of a distribution, or "unknown"."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"
