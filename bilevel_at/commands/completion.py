"""``bilevel-at completion bash``: a script that completes commands, problem files, flags and their values."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence

from ..data import DATA_NAMES
from ..errors import InputError
from ..evaluate.attacks import ATTACKS
from ..models import MODELS, TRAINED
from ..runs.problem_file import ProblemFile, packaged_problems
from ..solvers import SOLVERS
from . import export, report
from .flags import Flag, flags_of
from .options import EvaluateOptions, RunOptions

__all__ = ["command", "script"]

USAGE = """usage: bilevel-at completion bash

  source <(bilevel-at completion bash)                                   for this shell
  bilevel-at completion bash > ~/.local/share/bash-completion/completions/bilevel-at    for all later ones"""
SCRIPT = """\
# Completion of bilevel-at for bash, made by: bilevel-at completion bash
_bilevel_at() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}" flag="" words="" i
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
    return
  fi
  if [[ "$cur" == -* ]]; then
    case "$command" in
{flags}
    esac
    if [[ "$command" == run ]]; then
      local file="${{COMP_WORDS[2]##*/}}"
      case "${{file%.py}}" in
{of_problems}
      esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    return
  fi
  for (( i = COMP_CWORD - 1; i > 1; i-- )); do
    if [[ "${{COMP_WORDS[i]}}" == --* ]]; then flag="${{COMP_WORDS[i]}}"; break; fi
  done
  case "$command $flag" in
{values}
  esac
  if [[ -n "$words" ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
  fi
  if [[ -z "$words" || -z "$flag" ]]; then
    COMPREPLY+=($(compgen -f -- "$cur"))
  fi
}}
complete -o filenames -F _bilevel_at bilevel-at
"""


def command(args: Sequence[str]) -> int:
    """Print the script, and return exit status 0.

    Raises:
        InputError: for another shell than bash, which alone is tested.
    """
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if list(args) != ["bash"]:
        raise InputError(f"there is no completion for {' '.join(args)!r}; there is one for bash")
    print(script(), end="")
    return 0


def script() -> str:
    """The script for bash."""
    from .main import COMMANDS

    problems = {path.stem: ProblemFile(str(path)) for path, _ in packaged_problems()}
    common = {
        "run": flags_of(RunOptions),
        "evaluate": flags_of(EvaluateOptions),
        "report": flags_of(report._options),
        "export": flags_of(export._options),
    }
    own = {name: [*flags_of(file.problem), *(_of_solver(file))] for name, file in problems.items()}
    solvers = {flag.name: flag for kind in SOLVERS.values() for flag in flags_of(kind, skip=["inner"])}
    values = [
        _line(f"{command} {_flag(flag)}", choices)
        for command, flags in common.items()
        for flag in [*flags, *(solvers.values() if command == "run" else ())]
        if (choices := _choices(flag))
    ]
    first: dict[str, Iterable[str]] = {"run": problems, "evaluate": TRAINED, "completion": ["bash"]}
    values += [_line(f"{command} ", choices) for command, choices in first.items()]
    every = {**common, "run": [*common["run"], *solvers.values()]}
    return SCRIPT.format(
        commands=" ".join(COMMANDS),
        flags="\n".join(_line(name, ["--help", *map(_flag, flags)], 6) for name, flags in every.items()),
        of_problems="\n".join(_line(name, map(_flag, flags), 8, "$words ") for name, flags in own.items()),
        values="\n".join(values),
    )


def _of_solver(file: ProblemFile) -> list[Flag]:
    return [] if file.solver is None else flags_of(file.solver, skip=["name"])


def _flag(flag: Flag) -> str:
    return "--" + flag.name.replace("_", "-")


def _line(pattern: str, words: Iterable[str], indent: int = 4, before: str = "") -> str:
    return f'{" " * indent}"{pattern}") words="{before}{" ".join(words)}" ;;'


def _choices(flag: Flag) -> list[str]:
    """The values that a flag is known to take."""
    named: dict[str, Iterable[str]] = {"data": DATA_NAMES, "model": MODELS, "attacks": _attacks()}
    if flag.name in named:
        return list(named[flag.name])
    return list(dict.fromkeys(_literals(flag.type)))


def _attacks() -> list[str]:
    return [
        *(name for name in ATTACKS if name.isalpha()),
        "pgd-50-10",
        "beta-30",
        "nearest-40-3-2",
        "apgd-ce",
        "apgd-t",
    ]


def _literals(kind: object) -> list[str]:
    if typing.get_origin(kind) is typing.Literal:
        return [str(value) for value in typing.get_args(kind)]
    return [value for part in typing.get_args(kind) for value in _literals(part)]
