"""What the scripts of this folder share: their arguments' least value, and the page that they print and write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bilevel_at.errors import InputError


def at_least_one(**values: int | None) -> None:
    """Raise :class:`InputError` where a flag, by its argument's name, is below 1; None is a flag that is not given."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def show(lines: Sequence[str], write: str | None) -> None:
    """Print a page of markdown, and write it where a file is named."""
    text = "\n".join(lines) + "\n"
    Console().print(text, highlight=False, markup=False, soft_wrap=True)
    if write is not None:
        Path(write).parent.mkdir(parents=True, exist_ok=True)
        Path(write).write_text(text)
