"""Gradient checkpointing that is not reentrant changes no gradient; the reentrant kind is refused in a line."""

from __future__ import annotations


def test_gradients_are_those_without_checkpointing(example):
    found = example("train_with_checkpointing")
    assert found["gap"] < 1e-12 < found["step"].implicit_norm
    assert found["refusal"].endswith("pass use_reentrant=False")
