"""``bilevel-at completion bash``: bash itself is asked what it would complete."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from running import PROBLEMS

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands import main
from bilevel_at.commands.completion import command, script
from bilevel_at.commands.flags import flags_of
from bilevel_at.commands.options import EvaluateOptions, RunOptions

BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="bash is not installed")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "completion.bash"
    path.write_text(script(), encoding="utf-8")
    return path


def completed(source, *words):
    """What bash would complete the last word to."""
    line = " ".join(map(shlex.quote, words))
    asks = f"source {shlex.quote(str(source))}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _bilevel_at; "
    asks += "printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run([BASH, "--norc", "-uc", asks], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done
    return [word for word in done.stdout.split("\n") if word]


@needs_bash
@pytest.mark.usefixtures("elsewhere")
def test_bash_completes(source):
    assert completed(source, "bilevel-at", "") == list(main.COMMANDS)
    assert completed(source, "bilevel-at", "ev") == ["evaluate"]
    Path("fast_mine.py").touch()
    assert set(completed(source, "bilevel-at", "run", "fast")) == {"fastat", "fastbat", "fast_mine.py"}
    assert set(completed(source, "bilevel-at", "run", "")) >= set(PROBLEMS)
    assert completed(source, "bilevel-at", "run", "fastbat", "--epo") == ["--epochs"]
    assert completed(source, "bilevel-at", "run", "problems/fastbat.py", "--ig-f") == ["--ig-factor"]
    assert completed(source, "bilevel-at", "run", "fastat", "--ig-f") == []
    assert completed(source, "bilevel-at", "run", "fastat", "--data", "cifar") == ["cifar10", "cifar100"]
    assert completed(source, "bilevel-at", "run", "fastat", "--attacks", "clean", "pg") == ["pgd-50-10"]
    assert completed(source, "bilevel-at", "run", "fastat", "--solver", "full") == ["full-kkt"]
    assert completed(source, "bilevel-at", "evaluate", "digits") == ["digits-fastbat"]
    assert completed(source, "bilevel-at", "evaluate", "r", "--which", "l") == ["last", "last_good"]
    assert completed(source, "bilevel-at", "report", "fast") == ["fast_mine.py"]
    assert completed(source, "bilevel-at", "run", "fastat", "--out", "fast") == ["fast_mine.py"]


@needs_bash
def test_every_flag_is_completed(source):
    for name, kind in (("run", RunOptions), ("evaluate", EvaluateOptions)):
        known = set(completed(source, "bilevel-at", name, "x", "--"))
        assert {"--" + flag.name.replace("_", "-") for flag in flags_of(kind)} <= known


def test_other_shells_are_not_claimed(capsys):
    for shell in ("zsh", "tcsh", "fish"):
        with pytest.raises(ba.InputError, match="there is one for bash"):
            command([shell])
        assert shell not in main._usage()
    for flag in ("--tyro-print-completion", "--tyro-write-completion"):
        with pytest.raises(ba.InputError, match="bilevel-at completion bash"):
            run_module.run(["fastat", flag, "zsh"])
    assert command([]) == 0 and "source <(bilevel-at completion bash)" in capsys.readouterr().out
    assert command(["bash"]) == 0 and capsys.readouterr().out == script()
