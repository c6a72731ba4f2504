"""foolbox's PGD leaves standing what ours does."""

from __future__ import annotations

import pytest

pytest.importorskip("foolbox", reason="foolbox is not installed: pip install foolbox")


def test_a_trained_network_is_attacked_as_here(example, run):
    found = example("attack_with_foolbox", run)
    assert 0.05 < found["ours"] < 0.95
    assert found["theirs"] == pytest.approx(found["ours"], abs=0.02)  # the starts are other draws
    assert found["theirs"] < (found["model"](found["test"].x).argmax(1) == found["test"].y).float().mean() - 0.1
