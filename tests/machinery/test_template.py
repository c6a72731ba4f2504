"""docs/template, a project of one's own: its test passes outside the checkout, and broken on purpose says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FIRST = """
from hypothesis import Phase, settings

settings.register_profile("first", phases=[Phase.generate], max_examples=20, derandomize=True)
settings.load_profile("first")
"""  # the first failing example will do: making it small takes most of the time

LOGITS = "model(batch.x + delta)"
LOSS = "logits.gather(1, batch.y[:, None])[:, 0] - logits.logsumexp(1)"
BROKEN = {
    "attack term without θ": (LOGITS, f"{LOGITS} * (1 + model(batch.x).detach().square().mean(1, keepdim=True))"),
    "mean over samples": (LOSS, f"({LOSS}).mean()"),
    "hidden randomness": (LOGITS, "model(batch.x + delta + 0.1 * torch.rand(()))"),
    "hidden state": (LOSS, f"(1 + 0.01 * confusion.__dict__.setdefault('n', []).__iadd__([0]).__len__()) * ({LOSS})"),
}


def run(folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)


def test_the_template_passes(tmp_path):
    folder = shutil.copytree(ROOT / "docs" / "template", tmp_path / "mine")
    assert len((folder / "test_my_problem.py").read_text().split("@settings")[1].splitlines()) < 12
    outcome = run(folder)
    assert outcome.returncode == 0 and "1 passed" in outcome.stdout, outcome.stdout


@pytest.mark.parametrize("cause", BROKEN)
def test_a_broken_template_is_told_why(cause, tmp_path):
    folder = shutil.copytree(ROOT / "docs" / "template", tmp_path / "mine")
    file = folder / "my_problem.py"
    text, (right, wrong) = file.read_text(), BROKEN[cause]
    assert text.count(right) == 1
    (folder / "conftest.py").write_text(FIRST)
    file.write_text("import torch\n" + text.replace(right, wrong))
    outcome = run(folder)
    assert outcome.returncode == 1 and f"{cause}: " in outcome.stdout, outcome.stdout
