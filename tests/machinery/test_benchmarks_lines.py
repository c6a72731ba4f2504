"""Runs side by side: a line for each that ends, and one clear error where one does not."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from benchmarking import FOLDER

import bilevel_at as ba

LINES = Path("lines.jsonl")


def work(what):
    """A line, or what can go wrong in its place."""
    if what == "raises":
        raise ValueError("no such thing")
    while what in ("killed", "stopped") and not LINES.exists():  # the line of the one before
        time.sleep(0.01)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stopped":
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()
    return {"key": what, "of": os.getpid()}


@pytest.fixture
def side_by_side(elsewhere, monkeypatch):
    """Lines by these names, one after the other."""
    monkeypatch.syspath_prepend(FOLDER)  # a module's function is found by its name in another process
    from lines import side_by_side

    return lambda *names: side_by_side(work, [[(name, (name,)) for name in names]], LINES, len(names), 1)


def keys():
    return [json.loads(line)["key"] for line in LINES.read_text().splitlines()]


def test_one_that_fails_stops_no_other(side_by_side):
    with pytest.raises(ba.BilevelError, match="^raises: ValueError: no such thing$"):
        side_by_side("b", "raises", "a")
    assert keys() == ["a", "b"] and multiprocessing.active_children() == []


def test_a_process_that_is_killed_is_told_and_nothing_waits_for_it(side_by_side):
    with pytest.raises(ba.BilevelError, match="a process was killed, .*give the same command again"):
        side_by_side("a", "killed", "b")
    assert keys() == ["a"] and multiprocessing.active_children() == []


def test_a_terminated_script_ends_its_processes(side_by_side):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            side_by_side("a", "stopped", "b")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert keys() == ["a"] and multiprocessing.active_children() == []
