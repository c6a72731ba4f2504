"""A bare loop around a solver gives the weights that the same loop by hand gives."""

from __future__ import annotations


def test_both_loops_give_the_same_weights(example):
    found = example("train_in_a_loop")
    assert found["gap"] < 1e-9
    assert found["accuracy"] > 0.9
