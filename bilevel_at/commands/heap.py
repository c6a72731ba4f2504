"""The C library's heap, told to keep what is freed for the next pass."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
AT_MOST = 32 << 20  # bytes; the largest block that glibc can be told to keep


def keep_freed_memory() -> bool:
    """Let freed blocks of up to 32 MiB stay with the process, where the C library is glibc. Returns whether it does.

    By default glibc hands the end of its heap back to the system at once, and the next pass of the network pays for
    every page anew: an attack's pass on 250 digits takes 1.5 times as long (docs/results/attack-pass.md). This is for
    commands: a library leaves the heap of the process that imports it alone.

    Nothing is changed where the environment sets ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_``, or either
    in ``GLIBC_TUNABLES``.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or any(
        f"MALLOC_{name}_THRESHOLD_" in os.environ or f"malloc.{name.lower()}_threshold" in tunables
        for name in ("TRIM", "MMAP")
    ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(MMAP_THRESHOLD, AT_MOST)) and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))
