"""Two processes of accelerate train as one does; a network that it has wrapped is refused in a line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))
from ranks import ONLY_LINUX, on_processes  # noqa: E402

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "train_with_accelerate.py"
REFUSED = """
if accelerator.num_processes > 1:
    try:
        solver.backward(problem, accelerator.prepare_model(model), ba.Batch(x, y))
    except ba.InputError as error:
        accelerator.print("refused:", error)
"""


@ONLY_LINUX
def test_two_processes_give_the_weights_of_one(tmp_path):
    lines = {}
    for count in (1, 2):
        ends = on_processes(tmp_path, count, EXAMPLE.read_text() + REFUSED)
        assert [status for *_, status in ends] == [0] * count, ends
        lines[count] = ends[0][0]
    assert lines[1].startswith("1 processes: clean accuracy 9") and lines[2].startswith("2 processes: clean accuracy 9")
    one, two = (float(re.search(r"weights ([\d.]+)", line)[1]) for line in (lines[1], lines[2]))
    assert two == pytest.approx(one, rel=1e-9)
    assert re.search(r"refused: the network is a DistributedDataParallel.*reduce_gradients", lines[2])
