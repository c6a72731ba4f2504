"""torchrun itself: a process that is killed is started again by it, with the others, from the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import LONGEST, ONLY_LINUX, free_port
from running import ROOT

FLAGS = ["--epochs", "3", "--examples", "400", "--test-examples", "60", "--attacks", "clean", "pgd-2-1"]
FLAGS += ["--select", "pgd-2-1", "--save-every", "0.0001", "--out", "run", "--resume", "auto"]


def workers(agent):
    """The processes that torchrun has started, by their rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{agent}\n" not in (folder / "status").read_text():
                continue
            environment = dict(item.partition("=")[::2] for item in (folder / "environ").read_text().split("\0"))
        except OSError:  # it has ended
            continue
        if "RANK" in environment:
            found[int(environment["RANK"])] = int(folder.name)
    return found


@ONLY_LINUX
@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
        # Without an address torchrun asks for this machine by its name, which not every machine knows.
        + ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", "bilevel_at.run"]
        + [str(ROOT / "problems" / "atas.py"), *FLAGS],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + LONGEST
        while not Path("run/midway.pt").exists():
            assert job.poll() is None and time.monotonic() < end, job.communicate()
            time.sleep(0.01)
        os.kill(workers(job.pid)[1], signal.SIGKILL)
        printed, errors = job.communicate(timeout=LONGEST)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, errors[-2000:]
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert printed.count("atas with ZeroIG") == 2 and printed.count("test accuracy") == 1
    assert not list(Path("run").glob("*.partial"))
