"""Writes of a run: killed anywhere, on a full disk, in a directory that vanishes, by two commands at once."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from damaging import EPOCHS, command, content, go_on, heard, same
from marks import fast, thorough
from running import ROOT

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands.evaluate import command as evaluate
from bilevel_at.runs import durable
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.lock import locked
from bilevel_at.train import Trainer

COMMANDS = {"PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "problems", "problems")


@pytest.mark.parametrize(("problem", "every"), fast([("atas", 8), ("free", 8), ("awp", 8)], [("atas", 8)]))
def test_a_kill_between_any_two_changes_of_the_disk(problem, every, monkeypatch, capsys):
    """The disk as it was before each change of a name, and before each file is flushed: one in ``every`` is resumed.

    Each of them in the thorough profile.
    """
    states, every = [], 1 if thorough() else every

    def seen(function):
        def first_copied(*args, **named):
            if Path("out").exists():
                states.append(Path(f"state-{len(states)}"))
                shutil.copytree("out", states[-1])
            return function(*args, **named)

        return first_copied

    with monkeypatch.context() as patch:
        for name in ("replace", "link", "unlink", "fsync"):
            patch.setattr(os, name, seen(getattr(os, name)))
        run_module.run(command(problem, "out"))
    whole, resumed, not_begun = content("out"), 0, 0
    for state in states[::every]:
        if not (state / "config.json").exists():
            not_begun += 1
            continue
        result, lines = heard(go_on, problem, state)
        assert result == 0 and all("last save was not finished" in line for line in lines), (state, lines)
        assert same(content(state), whole), state
        assert not list(state.rglob(".*"))
        resumed += 1
        shutil.rmtree(state)
    with capsys.disabled():
        print(f"\n{problem}: {len(states)} states of the disk; {not_begun} before config.json, {resumed} resumed")
    assert resumed > 20 * EPOCHS // every


def test_a_full_disk_at_every_write(monkeypatch, capsys):
    """OSError(ENOSPC) at each write in turn, of every file of a run: one line, no rest, and what was done goes on."""
    run_module.run(command("atas", "whole"))
    whole, number = content("whole"), 0
    write = durable.Written.write
    while True:
        count = [0]

        def full(self, data, count=count, number=number):
            count[0] += 1
            if count[0] > 40 * number + 1:
                self._error = self._error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, data)

        out = Path(f"out-{number}")
        with monkeypatch.context() as patch:
            patch.setattr(durable.Written, "write", full)
            result, lines = heard(run_module.run, command("atas", out))
        if result == 0:
            break
        assert len(lines) == 1 and re.search(rf"{out}/\S+ cannot be written: No space left on device", lines[0]), lines
        assert not list(out.rglob(".*"))
        if (out / "config.json").exists():
            result, lines = heard(go_on, "atas", out)
            assert result == 0 and same(content(out), whole)
        number += 1
    with capsys.disabled():
        print(f"\na disk that is full at {number} places")
    assert number > 5


@pytest.mark.slow
def test_a_file_system_of_two_megabytes():
    Path("small").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", "small"], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        args = ["problems/atas.py", "--examples", "1200", "--epochs", "4", "--attacks", "clean", "--out", "small/out"]
        done = subprocess.run(
            [sys.executable, "-m", "bilevel_at.run", *args, "--select", "fgsm"],
            capture_output=True,
            text=True,
            env={**os.environ, **COMMANDS},
        )
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert re.search(r"small/out/\S+ cannot be written: No space left on device", done.stderr)
        assert not list(Path("small").rglob(".*"))
        run = RunDir("small/out")
        assert "last" not in run.checkpoints or run.checkpoint("last")["epochs"] == len(run.metrics())
    finally:
        subprocess.run(["umount", "small"], check=True)


def test_a_directory_that_vanishes_is_not_made_again(monkeypatch):
    epoch = Trainer.train_epoch

    def vanish(self, number):
        if number == 1:
            shutil.rmtree("out")
        return epoch(self, number)

    monkeypatch.setattr(Trainer, "train_epoch", vanish)
    result, lines = heard(run_module.run, command("atas", "out"))
    assert result is None and len(lines) == 1 and "cannot be written: No such file or directory" in lines[0]
    assert not Path("out").exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not hold for root")
def test_a_directory_without_permission():
    Path("out").mkdir(mode=0o500)
    result, lines = heard(run_module.run, command("atas", "out"))
    assert result is None and len(lines) == 1 and "cannot be written: Permission denied" in lines[0]


def test_an_error_of_the_disk_at_the_end_of_a_write(tmp_path, monkeypatch):
    """An fsync that fails counts as a write that failed."""
    run = RunDir(tmp_path / "out")
    run.write_json("results.json", {"a": 1})

    def fails(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(ba.BilevelError, match=r"results.json cannot be written: Input/output error"):
        run.write_json("results.json", {"a": 2})
    assert run.read_json("results.json") == {"a": 1} and [path.name for path in run.path.iterdir()] == ["results.json"]


def test_the_second_command_says_who_was_first(tmp_path):
    out = tmp_path / "out"
    with locked(out, "bilevel_at.run"):
        result, lines = heard(run_module.run, command("atas", out))
        assert result is None and len(lines) == 1
        assert re.search(rf"out is in use by bilevel_at.run \(process {os.getpid()} on \S+, since \d{{4}}-", lines[0])
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert not out.exists()  # it was made for the lock, and nothing was written
    assert run_module.run(command("atas", out)) == 0
    with locked(out, "bilevel_at.evaluate"):
        for job in (lambda: go_on("atas", out), lambda: evaluate([str(out), "--attacks", "clean"])):
            result, lines = heard(job)
            assert result is None and "is in use by bilevel_at.evaluate" in lines[0]
        assert heard(ba.load, out)[1] == [] and len(RunDir(out).metrics()) == EPOCHS  # readers need no lock
    assert go_on("atas", out) == 0


def test_a_dead_process_keeps_no_lock():
    """A real process that holds the lock, then is killed; a worker that it has forked lives on."""
    code = "import os, time\nfrom pathlib import Path\nfrom bilevel_at.runs.lock import locked\n"
    code += "with locked(Path('out'), 'another'):\n    worker = os.fork()\n    if worker:\n"
    code += "        print(worker, flush=True)\n    time.sleep(100)\n    os._exit(0)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **COMMANDS}
    )
    try:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        result, lines = heard(run_module.run, command("atas", "out"))
        assert result is None and f"in use by another (process {process.pid} on" in lines[0]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    try:
        assert Path("out/.lock").exists() and run_module.run(command("atas", "out")) == 0
        assert not Path("out/.lock").exists()
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.slow
def test_two_commands_in_one_directory():
    """Two real processes at the same time: one of them trains, the other leaves with status 2 and one line."""
    args = [sys.executable, "-m", "bilevel_at.run", *command("atas", "out")]
    args[args.index("--epochs") + 1] = "60"
    started = [
        subprocess.Popen(
            args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **COMMANDS}
        )
        for _ in range(2)
    ]
    deadline = time.monotonic() + 120
    said = [process.communicate(timeout=deadline - time.monotonic())[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2], said
    (refusal,) = [text for process, text in zip(started, said, strict=True) if process.returncode == 2]
    assert len(refusal.splitlines()) == 1 and ("is in use by" in refusal or "already holds a run" in refusal)
    assert len(RunDir("out").metrics()) == 60
