"""Command lines made from typed signatures, with errors of one line.

tyro reads the flags; this module says which ones there are, and turns its boxed messages into a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import signal
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro
from tyro import constructors

from ..errors import BilevelError, InputError
from ..evaluate.radius import number_from_text
from ..runs.manifest import DamageWarning
from .heap import keep_freed_memory
from .signals import Stopped

__all__ = ["Flag", "flags_of", "main", "parse"]


_registry = constructors.ConstructorRegistry()


@_registry.primitive_rule
def _float_rule(info: constructors.PrimitiveTypeInfo) -> constructors.PrimitiveConstructorSpec[float] | None:
    if info.type is not float:
        return None
    return constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda args: number_from_text(args[0]),
        is_instance=lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
        str_from_instance=lambda value: [f"{value:g}"],
    )


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag: ``--name`` with underscores as dashes, a type, a default, and a line of help.

    otherwise: what the help says in place of the default.
    unit: what the value counts, in place of INT or NUMBER.
    group: the title under which the help has it.
    """

    name: str
    type: Any
    default: Any = dataclasses.MISSING
    help: str = ""
    otherwise: str = ""
    unit: str = ""
    group: str = ""

    def hint(self) -> str | Callable[[str], str]:
        """The default in the help text: ``otherwise`` if it is given, nothing for None."""
        if self.otherwise:
            return f"({self.otherwise})"
        return "" if self.default in (None, ()) else lambda default: f"(default: {default})"


def _plain(text: str) -> str:
    """A docstring's text without reStructuredText's marks."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    return text.replace("``", "")


def _readable(kind: Any) -> bool:
    """Whether values of this type can be given on a command line."""
    if kind in (int, float, str, bool, type(None)):
        return True
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return True
    if origin in (typing.Union, types.UnionType):
        return all(_readable(a) for a in args)
    if origin in (tuple, list):
        return all(a is Ellipsis or _readable(a) for a in args)
    return False


def _metavar(kind: Any) -> str | None:
    """NUMBER rather than {None}|NUMBER for an optional number; None to use tyro's own."""
    options = [a for a in typing.get_args(kind) if a is not type(None)]
    if type(None) not in typing.get_args(kind) or len(options) != 1:
        return None
    if typing.get_origin(options[0]) is Literal:
        return "{" + ",".join(str(a) for a in typing.get_args(options[0])) + "}"
    return {float: "NUMBER", int: "INT", str: "TEXT"}.get(options[0])


def _help_texts(doc: str | None) -> dict[str, str]:
    """The ``name: text`` paragraphs of a docstring. Indented lines continue the paragraph."""
    texts: dict[str, str] = {}
    name = None
    for line in inspect.cleandoc(doc or "").splitlines():
        start = re.match(r"\s*(\w+): (.+)", line)
        if start:
            name = start[1]
            texts[name] = start[2].strip()
        elif name and line.startswith("    ") and line.strip():
            texts[name] += " " + line.strip()
        else:
            name = None
    return texts


def flags_of(
    function: Callable[..., Any], defaults: Mapping[str, Any] | None = None, skip: Iterable[str] = ()
) -> list[Flag]:
    """The flags for the typed keyword arguments of a function or a dataclass.

    An argument whose type cannot be given on a command line keeps its default and has no flag. Variadic arguments are
    ignored.

    Args:
        function: the function or the dataclass.
        defaults: values that replace defaults.
        skip: arguments without a flag.

    Raises:
        InputError: if an argument has neither a type that can be given nor a default.
    """
    defaults = dict(defaults or {})
    texts: dict[str, str] = {}
    for documented in reversed(function.__mro__ if isinstance(function, type) else [function]):
        texts |= _help_texts(documented.__doc__)
    try:
        hints = typing.get_type_hints(function)
    except (NameError, AttributeError, TypeError) as error:
        raise InputError(f"{function.__name__}(...) has a type that cannot be read: {error}") from None
    flags = []
    for p in inspect.signature(function).parameters.values():
        if p.name in skip or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        default = defaults.pop(p.name, dataclasses.MISSING if p.default is p.empty else p.default)
        kind = hints.get(p.name)
        if kind is None and default not in (dataclasses.MISSING, None):
            kind = type(default)
        if kind is None or not _readable(kind):
            if default is dataclasses.MISSING:
                raise InputError(f"{function.__name__}({p.name}) needs a type that a flag can have, or a default")
            continue
        flags.append(Flag(p.name, kind, default, texts.get(p.name, "")))
    if defaults:
        raise InputError(f"{function.__name__}(...) takes no {', '.join(defaults)}, which the recipe sets")
    return flags


def parse(
    flags: Sequence[Flag],
    args: Sequence[str],
    prog: str,
    description: str,
    lenient: bool = False,
    groups: Mapping[str, str] | None = None,
    epilogue: Callable[[], str] = lambda: "",
) -> dict[str, Any]:
    """Values by flag name. Prints help and exits 0 for ``--help``; raises :class:`InputError` for a mistake.

    Args:
        flags: the flags.
        args: the arguments.
        prog: the program, for the help text.
        description: of the program, for the help text.
        lenient: read the flags that are known and pass over the rest, ``--help`` included.
        groups: titles of groups of flags, in order, and what the help says below each.
        epilogue: called for the text below the help.
    """
    seen: set[str] = set()
    for flag in flags:
        if flag.name in seen:
            raise InputError(
                f"--{flag.name.replace('_', '-')} would mean two things: rename that argument of the problem file"
            )
        seen.add(flag.name)
    if hidden := next((word for word in args if word.startswith("--tyro-")), None):
        raise InputError(f"{hidden} is not a flag here; completion for bash is printed by: bilevel-at completion bash")
    options = _options(flags, groups or {})
    parsed: Any
    heard, printed = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(printed):
            parsed, unknown = tyro.cli(
                options,
                args=list(args),
                prog=prog,
                add_help=not lenient,
                description=description,
                registry=_registry,
                return_unknown_args=True,
            )
    except SystemExit as exit:
        if exit.code in (0, None):
            below = epilogue()
            sys.stdout.write(printed.getvalue().rstrip() + "\n" + (f"\n{below}\n" if below else ""))
            raise
        raise InputError(_one_line(heard.getvalue() or printed.getvalue())) from None
    if unknown and not lenient:
        raise InputError(_unknown(unknown[0], flags))
    return {flag.name: getattr(getattr(parsed, _attribute(flag.group), parsed), flag.name) for flag in flags}


def _attribute(group: str) -> str:
    """tyro's name of a group, which its help has as the title ``GROUP options``."""
    return re.sub(r"\W", "_", group)


def _options(flags: Sequence[Flag], groups: Mapping[str, str]) -> type:
    """A dataclass with a field for each flag, and a dataclass of its own for those of each group."""
    own = _dataclass("Options", [flag for flag in flags if flag.group not in groups], "")
    nested: list[Any] = []
    for group, about in groups.items():
        if members := [flag for flag in flags if flag.group == group]:
            part: Any = _dataclass(_attribute(group), members, about)
            nested.append((_attribute(group), Annotated[part, tyro.conf.OmitArgPrefixes]))
    return dataclasses.make_dataclass("Options", nested, bases=(own,), kw_only=True)


def _dataclass(name: str, flags: Sequence[Flag], about: str) -> type:
    fields = []
    for flag in sorted(flags, key=lambda f: f.default is not dataclasses.MISSING):
        shown = tyro.conf.arg(
            help=_plain(flag.help), metavar=flag.unit or _metavar(flag.type), help_behavior_hint=flag.hint()
        )
        kind: Any = Annotated[flag.type, shown]
        default = flag.default
        if isinstance(default, list):
            default = tuple(default)
        fields.append((flag.name, kind, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(name, fields, namespace={"__doc__": about})


def _one_line(box: str) -> str:
    """The first paragraph of tyro's message, which it draws in a box, or between rules where the terminal is ASCII."""
    boxed = "╭" in box
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip().strip("│").strip()
        if re.search(r"[─-]{3}", text) or set(text) <= set("╰╯"):
            sections.append([])
        else:
            sections[-1].append(text)
    messages = [" ".join(section) for section in sections if section]
    if not boxed:
        messages = messages[1:]  # the title
    line = (
        messages[0].replace("'None', ", "").replace(", 'None'", "")
        if messages
        else "the command line cannot be read; --help lists the flags"
    )
    line = re.sub(
        r"Could not find valid parse for arguments: \[(.*?)\]", r"\1 cannot be read (0.03 and 8/255 are numbers)", line
    )
    return re.sub(r"^Error parsing (\S+):", r"\1:", line)


def _unknown(argument: str, flags: Sequence[Flag]) -> str:
    if not argument.startswith("-"):
        return f"{argument!r} is one argument too many; flags start with --"
    name = argument.split("=")[0]
    known = ["--" + f.name.replace("_", "-") for f in flags]
    close = difflib.get_close_matches(name.replace("_", "-"), known, 1, 0.7)
    return f"{name} is not a flag here; " + (f"did you mean {close[0]}?" if close else "--help lists them")


def _printable(text: str) -> str:
    """The text with terminal control characters escaped, because text from files is not trusted."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _warn_in_one_line(prog: str) -> None:
    """Print warnings of damaged files without the place in the source that Python adds."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, DamageWarning):
            print(f"{prog}: {_printable(str(message))}", file=sys.stderr)
        else:
            usual(message, category, *where, **more)

    warnings.showwarning = show


def main(command: Callable[[Sequence[str]], int | None], prog: str) -> int:
    """:func:`status_of`, after which the process of a job ends at once."""
    status = status_of(command, prog)
    if processes := sys.modules.get("bilevel_at.commands.processes"):  # which imports torch
        processes.leave(status)
    return status


def status_of(command: Callable[[Sequence[str]], int | None], prog: str) -> int:
    """Run a command on ``sys.argv``, and return its exit status; an error is one line, and its traceback if asked for.

    Returns:
        0 on success, 2 for invalid input and for what cannot be computed, 1 for any other error, and 128 + the signal
        that has stopped it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal's encoding has ε
    keep_freed_memory()
    _warn_in_one_line(prog)
    asked = "--traceback" in sys.argv[1:]
    try:
        return command([word for word in sys.argv[1:] if word != "--traceback"]) or 0
    except (InputError, BilevelError) as error:
        if asked:
            traceback.print_exc()
        print(f"{_which(prog)}: {_printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.write(f"{prog}: the output was closed; what is done stays done\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # avoids a second error message at exit
        return 1
    except KeyboardInterrupt as error:
        if _process() == 0:  # all processes of a job stop together
            print(f"{prog}: stopped{': ' + str(error) if str(error) else ''}", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    except Exception as error:
        if asked:
            traceback.print_exc()
        from .processes import line_of  # here: it imports torch, which --help does without

        if (line := line_of(error)) is not None:
            print(f"{_which(prog)}: {_printable(line)}", file=sys.stderr)
        return 1


def _which(prog: str) -> str:
    """The program, and which of the processes of a job this is, but for the first."""
    return f"{prog} (process {_process()})" if _process() else prog


def _process() -> int:
    """The number of this process in its job; 0 in a command that is one process."""
    return int(os.environ.get("RANK", "0")) if os.environ.get("WORLD_SIZE", "1") != "1" else 0
