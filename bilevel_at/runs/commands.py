"""The commands that made a run's evaluations, for whoever wants to repeat them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from .directory import RunDir
from .evaluations import FOLDER
from .manifest import tell

__all__ = ["read_commands", "remember_command"]

COMMANDS = f"{FOLDER}/commands.json"


def remember_command(run: RunDir, words: list[str]) -> None:
    """Add a command to the list of those that made the stored evaluations, unless it is in the list."""
    try:
        known: Any = run.read_json(COMMANDS) if run.has(COMMANDS) else []
    except InputError as error:
        tell(f"the list of commands is begun anew: {error}")
        known = []
    commands = known if isinstance(known, list) else []
    if words not in commands:
        run.write_json(COMMANDS, [*commands, words])


def read_commands(run: Path) -> list[list[str]]:
    """The commands that made a run's evaluations.

    Raises:
        InputError: if the file is damaged.
    """
    file = run / COMMANDS
    if not file.is_file():
        return []
    commands = RunDir(run).read_json(COMMANDS)
    if not isinstance(commands, list) or not all(
        isinstance(command, list) and all(isinstance(word, str) for word in command) for command in commands
    ):
        raise InputError(f"{file} is not a list of commands, each a list of words")
    return commands
