"""What README and the pages under docs/ print still runs, and the names they list exist."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from marks import fast
from running import PROBLEMS, ROOT, SHORT, SOLVERS, run

import bilevel_at as ba
from bilevel_at.models import MODELS
from bilevel_at.solvers import HessianFreeKKT, ZeroIG

pytestmark = pytest.mark.usefixtures("elsewhere")

README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


def readme_block(containing):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    return next(b for b in blocks if containing in b)


@pytest.mark.parametrize("solver", fast(SOLVERS, ["full-kkt"]))
def test_the_readme_s_custom_problem_runs(solver):
    Path("my_problem.py").write_text(readme_block("def problem("))
    run("my_problem.py", "--epsilon", "0.5", "--solver", solver, *SHORT, "--out", "out")
    config = json.loads(Path("out/config.json").read_text())
    assert config["problem"]["epsilon"] == 0.5


def test_the_readme_s_figures_are_those_of_the_benchmark_s_page():
    """Last clean, FGSM and PGD-50-10 accuracy, copied from docs/results/digits.md without a slip."""
    cell = r"([\d.]+ ± [\d.]+)"
    page = (ROOT / "docs/results/digits.md").read_text()
    made = {m[1:] for m in re.findall(rf"^\| (\S+) \|(?:[^|]+\|){{3}} {cell} \| {cell} \| {cell} \|$", page, re.M)}
    shown = re.findall(rf"^\| [^|]+ \| {cell} \| {cell} \| {cell} \|$", README, re.M)
    assert len(made) > 10 and len(shown) > 10 and set(shown) <= made


def test_the_readme_s_times_are_those_of_the_benchmark_s_page():
    page = (ROOT / "docs/results/commands.md").read_text()
    made = re.findall(r"^\| `python -m bilevel_at.+` \| \d+ \| (\d+) \|$", page, re.M)
    shown = re.findall(r"\b(\d+) s\b(?: of a processor)?\)", README)
    assert shown == made and f"on {re.search(r'2[0-9-]{9}', page)[0]}" in README


def test_the_readme_s_example_runs():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    loader = [(torch.rand(5, 3, 2, 2), torch.randint(0, 4, (5,))) for _ in range(3)]
    before = model[1].weight.detach().clone()
    exec(readme_block("solver.backward"), {"model": model, "loader": loader})
    assert not torch.equal(model[1].weight, before)


def test_the_readme_s_check_fails_without_the_implicit_term(monkeypatch):
    """As README says; that it passes with FullKKT is in test_blocks.py."""
    monkeypatch.syspath_prepend(Path())
    Path("my_problem.py").write_text(readme_block("def problem("))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    names = {"model": model, "x": torch.rand(5, 3, 2, 2), "y": torch.randint(0, 4, (5,)), "ba": ba}
    check = readme_block("import hypergradcheck").replace("FullKKT", "ZeroIG")
    with pytest.raises(AssertionError, match="ZeroIG disagrees with finite differences"):
        exec(check, names)
    sys.modules.pop("my_problem")


def test_the_methods_page_s_python_runs():
    page = (ROOT / "docs/methods.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {}
    for block in blocks:
        exec(block, names)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    batch = ba.Batch(torch.rand(5, 3, 2, 2), torch.randint(0, 4, (5,)), torch.arange(5))
    step = names["solver"].backward(names["problem"], model, batch)
    assert step.loss.isfinite()
    lower = ba.Linearized(ba.minus(names["Drift"]()), ba.LinfBall(0.1), ba.Steps(ba.Gaussian(), "sign"), "taylor", 0.1)
    for solver in (ZeroIG(), HessianFreeKKT()):  # the reference prepared, and the one that θ moves
        assert solver.backward(ba.BilevelProblem(ba.UpperProblem(), lower), model, batch).loss.isfinite()


def test_the_methods_page_names_every_method_and_model():
    page = (ROOT / "docs/methods.md").read_text()
    assert all(f"`{problem}.py`" in page for problem in PROBLEMS)
    for name in MODELS:
        family = re.sub(r"(18|34|50|16_8|28_10|34_10)$", "", name)
        assert re.search(rf"`{family}", page), name


def test_benchmarks_readme_has_every_file():
    """Each script in a row, and each other file as a part of a script or among what is shared."""
    folder = ROOT / "benchmarks"
    scripts, shared = (folder / "README.md").read_text().split("What several scripts share")
    rows = {
        name for line in scripts.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)\.py`", line)
    }
    named = rows | set(re.findall(r"`(\w+)\.py`", shared))
    files = {path.stem for path in folder.glob("*.py")}
    run = {path.stem for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert named <= files and run == rows
    assert {name for name in files - named if not any(name.startswith(f"{row}_") for row in rows)} == set()
