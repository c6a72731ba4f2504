"""Freed memory stays with a command's process, and with no other."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from bilevel_at.commands import heap

PASSES = """
import resource, sys, torch
from bilevel_at.commands.heap import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def passes():
    for _ in range(50):
        parts = [torch.ones(2**19) for _ in range(8)]  # 2 MiB each
        del parts
passes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
passes()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of glibc is what is told")


def page_faults(how: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PASSES, how], capture_output=True, text=True, check=True, env={**clean, **environment}
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@on_glibc
def test_pages_are_not_fetched_again():
    """400 tensors of 2 MiB are 200,000 pages, and without this every one of them is fetched, in most processes."""
    kept, faults = page_faults("keep")
    assert kept == "True" and faults < 500


@on_glibc
def test_what_the_environment_says_is_left_alone():
    assert page_faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"
    assert page_faults("keep", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1000000")[0] == "False"


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert heap.keep_freed_memory() is False
