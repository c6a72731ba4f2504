"""A Hugging Face network behind an adapter of three lines; without it a line says what to do."""

from __future__ import annotations

import pytest

import bilevel_at as ba

pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


def test_a_network_whose_output_has_logits_is_trained(example):
    found = example("train_huggingface")
    clean, robust = (found["result"][name].accuracy for name in ("clean", "pgd-10-1"))
    assert clean > 0.6 and 0.3 < robust < clean
    assert found["step"].implicit_norm > 0
    x, y = found["train"].x[:4], found["train"].y[:4]
    with pytest.raises(ba.InputError, match="output is a ImageClassifierOutput; losses take logits.*network.x..logits"):
        found["solver"].backward(found["problem"], found["model"].network, ba.Batch(x, y))
