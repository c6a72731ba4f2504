"""``bilevel-at run | evaluate | report | conformance | export | completion``: the commands under one name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import InputError
from . import flags

__all__ = ["command", "main"]

PROG = "bilevel-at"
COMMANDS = {
    "run": (".run", "run", "train a robust model from a problem file"),
    "evaluate": (".evaluate", "command", "attack the networks of a run, or weights from elsewhere"),
    "report": (".report", "command", "make one page about runs"),
    "conformance": (".conformance", "command", "compare hypergradients with closed forms, other libraries' too"),
    "export": (".export", "command", "write the weights of a run to a .safetensors file, to share"),
    "completion": (".completion", "command", "print a script with which bash completes all of this"),
}
"""Name -> the module and the function, and what it does; but for the last two, also ``python -m bilevel_at.NAME``."""


def main() -> int:
    """The console script."""
    return flags.main(command, PROG)


def command(args: Sequence[str]) -> int:
    """Run the command named by the first argument with the other arguments."""
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        print(f"{PROG} {__version__}")
        return 0
    if args[0] not in COMMANDS:
        close = difflib.get_close_matches(args[0], COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"commands are {', '.join(COMMANDS)}"
        raise InputError(f"{args[0]!r} is not a command; {hint}")
    module, function, _ = COMMANDS[args[0]]
    result: int = getattr(import_module(module, __package__), function)(args[1:])
    return result


def _usage() -> str:
    lines = [f"usage: {PROG} COMMAND ...", ""]
    lines += [f"  {name:<13}{about}" for name, (_, _, about) in COMMANDS.items()]
    return "\n".join([*lines, "", f"{PROG} COMMAND --help says more; {PROG} --version names the version."])
