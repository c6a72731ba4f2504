"""A Hugging Face network behind an adapter of three lines; without it a line says what to do."""

from __future__ import annotations

import pytest
import torch

import bilevel_at as ba
from bilevel_at.solvers import HessianFreeKKT, ValueFunction, ZeroIG

pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


def test_a_network_whose_output_has_logits_is_trained(example):
    found = example("train_huggingface")
    clean, robust = (found["result"][name].accuracy for name in ("clean", "pgd-10-1"))
    assert clean > 0.6 and 0.3 < robust < clean
    assert found["step"].implicit_norm > 0
    x, y = found["train"].x[:4], found["train"].y[:4]
    with pytest.raises(ba.InputError, match="output is a ImageClassifierOutput; losses take logits.*network.x..logits"):
        found["solver"].backward(found["problem"], found["model"].network, ba.Batch(x, y))


@pytest.fixture
def transformer():
    from transformers import ViTConfig, ViTForImageClassification

    class Logits(torch.nn.Module):
        def __init__(self, attention):
            super().__init__()
            sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
            shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 4}
            self.network = ViTForImageClassification(ViTConfig(**sizes, **shape, attn_implementation=attention))

        def forward(self, x):
            return self.network(pixel_values=x).logits

    return Logits


def a_problem():
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.1), "zero", "taylor", 1.0)
    return ba.BilevelProblem(ba.UpperProblem(), lower), ba.Batch(torch.rand(4, 1, 8, 8), torch.arange(4))


def test_fused_attention_is_refused_where_it_is_differentiated_twice(transformer):
    model, (problem, batch) = transformer("sdpa"), a_problem()
    with pytest.raises(ba.InputError, match=r"use torch.nn.attention.sdpa_kernel\(SDPBackend.MATH\), ValueFunction"):
        HessianFreeKKT().backward(problem, model, batch)
    for solver in (ZeroIG(), ValueFunction()):
        assert solver.backward(problem, model, batch).loss.isfinite()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # renamed in version 6
def test_their_gradient_checkpointing_changes_nothing(transformer):
    model, (problem, batch) = transformer("eager").train(), a_problem()
    plain = HessianFreeKKT().hypergradient(problem, model, batch)
    model.network.gradient_checkpointing_enable({"use_reentrant": False})
    saved = HessianFreeKKT().hypergradient(problem, model, batch)
    assert saved.implicit_norm > 0
    torch.testing.assert_close(saved.implicit, plain.implicit)
    model.network.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ba.InputError, match="checkpointing is reentrant.*pass use_reentrant=False"):
        HessianFreeKKT().hypergradient(problem, model, batch)
