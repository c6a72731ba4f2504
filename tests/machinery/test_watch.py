"""A look at the loss: at once on a CPU, later and without a wait on a GPU."""

from __future__ import annotations

import pytest
import torch

from bilevel_at.train.watch import Watch


def test_on_a_cpu_every_number_is_seen_at_once():
    seen = []
    watch = Watch(seen.append)
    for number in (1.0, float("inf")):
        watch.see(torch.tensor(number))
    assert seen == [1.0, float("inf")]


def test_a_device_without_values_is_let_be():
    Watch(lambda number: pytest.fail(f"{number} was looked at")).see(torch.empty((), device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_copy_is_seen_when_it_has_arrived():
    seen = []
    watch = Watch(seen.append)
    for number in (1.0, 2.0, 3.0):
        watch.see(torch.tensor(number, device="cuda"))
        torch.cuda.synchronize()
    assert seen == [1.0, 2.0]
