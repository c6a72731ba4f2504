"""The page of ``speedrun_cpu.py``."""

from pathlib import Path


def write_page(folder: Path) -> None:
    """To come."""
