"""What the tests of several processes share: they are started as torchrun starts them, and always end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="gloo is told the name of Linux's loopback interface")
LONGEST = 400  # seconds


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(count, *args, **more):
    """``python ARGS`` in ``count`` processes of one job."""
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, args)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )
        for rank in range(count)
    ]


def outcomes(jobs, longest=LONGEST):
    """(what it printed, its errors, its exit status) of each process; those that do not end are killed."""
    end = time.monotonic() + longest
    try:
        return [(*job.communicate(timeout=max(1, end - time.monotonic())), job.returncode) for job in jobs]
    finally:
        for job in jobs:
            job.kill()


END = """
import os
import sys
sys.stdout.flush()
os._exit(0)  # gloo's threads abort one process in some tens at its end
"""


def on_processes(tmp_path, count, program, *args):
    """The outcomes of a program on several processes."""
    file = tmp_path / f"program{count}.py"
    file.write_text(program + END)
    return outcomes(start(count, file, *args))


def printed(tmp_path, count, program, *args):
    """What each process of a program has printed; all of them have ended well."""
    results = on_processes(tmp_path, count, program, *args)
    assert [code for *_, code in results] == [0] * count, "\n".join(errors[-2000:] for _, errors, _ in results)
    print(results[0][0])
    return [text for text, *_ in results]


HEAD = '''
import copy
import sys
import torch
import torch.distributed as dist
from torch import nn

import bilevel_at as ba
from bilevel_at import shares

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()


def everywhere(parts):
    """The sums over processes of tensors that each has a part of."""
    return [shares.summed(part) for part in parts]


def close(name, one, other, tolerance):
    gap = max((a - b).abs().max().item() / max(1.0, b.abs().max().item()) for a, b in zip(one, other, strict=True))
    assert gap <= tolerance, (name, rank, gap)
    return gap
'''
"""How a program begins that compares several processes with one."""
