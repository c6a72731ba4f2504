"""Adapters of PEFT: only they move, the hypergradient in them is right, and robustness grows."""

from __future__ import annotations

import pytest
import torch

import bilevel_at as ba
from bilevel_at.testing import hypergradcheck

pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")


def test_only_adapters_move_and_their_gradient_is_right(example, run):
    found = example("train_with_lora", run)
    assert found["kept"] and found["end"] > found["start"]
    assert all("lora_" in name for name, p in found["model"].named_parameters() if p.requires_grad)
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.2), "zero", "taylor", 1.0)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    batch = ba.Batch(found["train"].x[:4].double(), found["train"].y[:4])
    step = found["solver"].hypergradient(problem, found["model"].double(), batch)
    assert step.implicit_norm > 0 and torch.isfinite(step.loss)
    assert hypergradcheck(problem, found["solver"], found["model"], batch)
