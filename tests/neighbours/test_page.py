"""The page names every example, every example has its test, and its own code runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "neighbours.md").read_text(encoding="utf-8")


def test_every_example_of_the_page_is_there_and_tested():
    named = set(re.findall(r"\(examples/(\w+)\.py\)", PAGE))
    assert len(named) >= 13
    for name in named:
        assert (ROOT / "docs" / "examples" / f"{name}.py").is_file()
        assert f'"{name}' in (ROOT / "tests" / "neighbours" / f"test_{name}.py").read_text(encoding="utf-8"), name


def test_the_adapter_of_the_page():
    (adapter,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "class Logits" in block)
    names = {"torch": torch}
    exec(adapter, names)

    class Output:
        def __init__(self, logits):
            self.logits = logits

    network = names["Logits"](lambda pixel_values: Output(2 * pixel_values))
    assert torch.equal(network(torch.ones(3)), torch.full((3,), 2.0))
