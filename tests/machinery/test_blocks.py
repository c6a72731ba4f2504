"""Every code block of README and of the pages runs, or is skipped with its reason.

Python blocks run page by page, from top to bottom, in one set of names that begins with those of :func:`given`.
Commands of this library run with ``--dry-run``; other shell blocks say ``<!-- not run here: why -->`` in the line above
them. So does Python that needs what is not there; a page that imports a package which is not installed is skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT, SHELL, blocks, commands, pages_with
from running import npz

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.solvers import HessianFreeKKT

pytestmark = pytest.mark.usefixtures("elsewhere")

PYTHON, COMMANDS = pages_with("python"), pages_with(*SHELL)


def given():
    """What pages take as given: a network of twelve inputs and three classes, some batches, a problem and a solver."""
    torch.manual_seed(0)
    hidden = torch.nn.Linear(12, 8)
    model = torch.nn.Sequential(torch.nn.Flatten(), hidden, torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    x, y = torch.rand(6, 3, 2, 2).double(), torch.arange(6) % 3
    names = {"model": model, "x": x, "y": y, "loader": [(x, y)] * 2, "batch": ba.Batch(x, y, torch.arange(6))}
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.05), "uniform", "taylor", step=0.5)
    players = {"problem": ba.BilevelProblem(ba.UpperProblem(), lower), "solver": HessianFreeKKT()}
    return {**names, **players, "torch": torch, "ba": ba}


def save(block):
    if block.saved:
        Path(block.saved).write_text(block.code, encoding="utf-8")


def need(error):
    """Skip where what is missing is a package of others."""
    name = (error.name or "").split(".")[0]
    if name in ("", "bilevel_at"):
        raise error
    pytest.skip(f"needs {name}, which is not installed")


@pytest.mark.parametrize("page", PYTHON)
def test_python(page, monkeypatch):
    """In one process for a page; lines of an error are those of the page."""
    monkeypatch.syspath_prepend(Path())
    names, left_out = given(), []
    for block in blocks(PYTHON[page]):
        if block.language != "python":
            continue
        if block.why:
            left_out.append(f"line {block.line}: {block.why}")
            continue
        save(block)
        code = "\n" * block.line + block.code
        try:
            exec(
                compile(code, str(PYTHON[page]), "exec"),
                {"__name__": "saved"} if block.saved.endswith(".py") else names,
            )
        except ModuleNotFoundError as error:
            need(error)
    for block in blocks(PYTHON[page]):
        sys.modules.pop(Path(block.saved).stem, None)
    if left_out:
        pytest.skip("the rest ran; not run here: " + "; ".join(left_out))


@pytest.mark.parametrize("page", COMMANDS)
def test_commands(page, capsys):
    """``python -m bilevel_at.run …`` as far as --dry-run goes, with the files that the page has saved before."""
    npz("my_images.npz"), npz("FILE.npz")
    names, skipped = given(), []
    for block in blocks(COMMANDS[page]):
        save(block)
        if block.language == "python" and "np.savez" in block.code:
            exec(block.code, names)
        if block.language not in SHELL:
            continue
        if block.why:
            skipped.append(f"line {block.line}: {block.why}")
            continue
        for words in commands(block):
            if words[0] in ("pip", "pytest") or words[:3] == ["python", "-m", "pytest"]:
                skipped.append(f"line {block.line}: {' '.join(words)}")
                continue
            if words[0] == "python" and words[1].startswith("docs/examples/"):
                assert any(Path(words[1]).stem in test.read_text() for test in (ROOT / "tests/neighbours").glob("*.py"))
                skipped.append(f"line {block.line}: {words[1]} runs in tests/neighbours")
                continue
            assert words[:3] == ["python", "-m", "bilevel_at.run"], (
                f"{page}, line {block.line}: {' '.join(words)} is not run by this test; write "
                "<!-- not run here: why --> above the block"
            )
            try:
                assert run_module.run([*words[3:], "--dry-run"]) == 0
            except SystemExit as done:  # --list, --help
                assert done.code == 0
    capsys.readouterr()
    if skipped:
        pytest.skip("the rest ran; not run here: " + "; ".join(skipped))


def test_every_block_says_what_it_is():
    """A fence without a language is neither run nor marked."""
    for page in (ROOT / "docs").rglob("*.md"):
        assert all(block.language for block in blocks(page)), page


def test_an_example_of_one_s_own_takes_at_most_thirty_lines():
    for block in blocks(ROOT / "docs" / "own.md"):
        assert len([line for line in block.code.splitlines() if line.strip()]) <= 30, block.line
