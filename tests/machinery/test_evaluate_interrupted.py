"""The evaluate command, stopped inside AutoAttack, goes on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from evaluating_runs import PYTHON, arrays, evaluate, read

from bilevel_at.runs import evaluations

pytestmark = pytest.mark.usefixtures("run_here")

AUTOATTACK = ["run", "--attacks", "autoattack", "--which", "last", "--examples", "16", "--batch-size", "8"]


STATE = Path("run/evaluation/last/autoattack.npz")


def position():
    try:
        return tuple(arrays(STATE)["position"][:2])
    except (OSError, KeyError, ValueError, EOFError):
        return (0, 0)


def wait_for(process, stage):
    deadline = time.monotonic() + 120
    while position()[0] < stage and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


@pytest.fixture(scope="module")
def unbroken(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    shutil.copytree(trained_run, folder / "run")
    before = Path.cwd()
    os.chdir(folder)
    try:
        evaluate(*AUTOATTACK, "--checks", 0)
        return arrays(STATE)
    finally:
        os.chdir(before)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_autoattack_goes_on(interruptible, unbroken, how):
    args = [*AUTOATTACK, "--checks", "0"]
    process = interruptible([*PYTHON, *args])
    wait_for(process, 1)
    if how == signal.SIGINT:
        time.sleep(0.5)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in said
        assert said.splitlines()[-1] == "bilevel_at.evaluate: stopped: what is done is in run; the same command goes on"
    else:
        assert process.returncode == -signal.SIGKILL
    assert not Path("run/results.json").exists() and not bool(arrays(STATE)["finished"])
    left, stopped = position(), arrays(STATE)
    assert left >= (1, 0)
    done = stopped["broken"] >= 0
    honest, told = evaluations.attack_examples, []

    def listen(*positional, **named):
        for state in honest(*positional, **named):
            told.append((state[0].stage, state[2]))
            yield state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluations, "attack_examples", listen)
        evaluate(*args)
    assert told and told[0] > left  # nothing finished is done again
    final = arrays(STATE)
    for name in ("broken", "said", "correct", "label"):
        assert (final[name] == unbroken[name]).all(), name
    assert (final["broken"][done] == stopped["broken"][done]).all() and float(final["seconds"]) >= stopped["seconds"]
    entry = read("run/results.json")["last"]["autoattack"]
    assert entry["accuracy"] == pytest.approx(unbroken["correct"].mean()) and entry["seconds"] >= stopped["seconds"]
