"""A Hugging Face text classifier, attacked in its embeddings: a loss says where its logits are."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


def test_a_text_classifier_is_trained_under_attack(example):
    found = example("train_huggingface_text")
    larger = max(found["chance"], 1 - found["chance"])
    assert found["clean"] > larger + 0.2 and larger < found["robust"] <= found["clean"]
    assert found["step"].implicit_norm > 0 and found["embed"].weight.grad is None
