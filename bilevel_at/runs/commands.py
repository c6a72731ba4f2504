"""The commands that made a run's evaluations, for whoever wants to repeat them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from .directory import RunDir
from .evaluations import FOLDER

__all__ = ["read_commands", "remember_command"]

COMMANDS = "commands.json"


def remember_command(run: RunDir, words: list[str]) -> None:
    """Add a command to the list of those that made the stored evaluations, unless it is in the list."""
    folder = RunDir(run.path / FOLDER)
    try:
        known: Any = folder.read_json(COMMANDS) if (folder.path / COMMANDS).exists() else []
    except InputError:  # damaged
        known = []
    commands = known if isinstance(known, list) else []
    if words not in commands:
        folder.write_json(COMMANDS, [*commands, words])


def read_commands(run: Path) -> list[list[str]]:
    """The commands that made a run's evaluations.

    Raises:
        InputError: if the file is damaged.
    """
    folder = RunDir(run / FOLDER)
    file = folder.path / COMMANDS
    if not file.is_file():
        return []
    commands = folder.read_json(COMMANDS)
    if not isinstance(commands, list) or not all(
        isinstance(command, list) and all(isinstance(word, str) for word in command) for command in commands
    ):
        raise InputError(f"{file} is not a list of commands, each a list of words")
    return commands
