"""``bilevel-at``: the same commands under one name, and errors of one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bilevel_at as ba
from bilevel_at.commands import evaluate, main, report, run

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_is_that_of_its_module(monkeypatch):
    for name, module, function in (
        ("run", run, "run"),
        ("evaluate", evaluate, "command"),
        ("report", report, "command"),
    ):
        monkeypatch.setattr(module, function, lambda args, name=name: print(name, args) or 7)
        assert main.command([name, "a", "--b"]) == 7
    assert set(main.COMMANDS) == {"run", "evaluate", "report", "conformance", "export", "completion"}


def test_help_and_version(capsys):
    for args in ([], ["-h"], ["--help"]):
        assert main.command(args) == 0
        shown = capsys.readouterr().out
        assert "usage: bilevel-at COMMAND" in shown and all(name in shown for name in main.COMMANDS)
    assert main.command(["--version"]) == 0
    assert capsys.readouterr().out == f"bilevel-at {ba.__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"), [("evalute", "did you mean evaluate?"), ("xyz", "commands are run, evaluate")]
)
def test_a_mistake_is_one_line(word, hint):
    with pytest.raises(ba.InputError, match=hint.replace("?", r"\?")):
        main.command([word])


@pytest.mark.slow
def test_the_console_script_is_declared_and_ends_as_the_commands_do(tmp_path):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    module, function = re.search(r'(?m)^bilevel-at = "([\w.]+):(\w+)"$', project).groups()
    code = f"import sys; from {module} import {function}; sys.argv[0] = 'bilevel-at'; sys.exit({function}())"
    command = [sys.executable, "-c", code, "run", "nothing.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("bilevel-at: problem file nothing.py does not exist")
