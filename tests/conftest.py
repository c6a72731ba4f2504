"""Hypothesis profiles: ``ci``, derandomised, is the default; ``pytest --hypothesis-profile thorough`` looks further."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
import torch
from hypothesis import HealthCheck, settings

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ci", derandomize=True, max_examples=50, deadline=None, suppress_health_check=SLOW_IS_FINE, print_blob=True
)
settings.register_profile(
    "thorough", max_examples=400, deadline=None, suppress_health_check=SLOW_IS_FINE, print_blob=True
)
settings.load_profile("ci")
torch.set_num_threads(1)  # tiny networks: threads only get in each other's way, and in that of pytest -n
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same in the processes that tests start


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def interruptible():
    """Start a process that Ctrl-C can stop: one started in the background of a script would inherit that it cannot."""

    def start(command, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            command, **pipes, **options, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        )

    return start
