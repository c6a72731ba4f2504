"""pyautoattack, called directly on a loaded network, breaks the images that it breaks through this library."""

from __future__ import annotations

import torch


def test_a_trained_network_is_attacked_as_here(example, run):
    found = example("attack_with_pyautoattack", run)
    assert torch.equal(found["theirs"], found["ours"])
    assert 0 < found["theirs"].sum() < len(found["test"])
