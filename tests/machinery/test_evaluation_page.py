"""docs/evaluation.md: its names exist, its example runs; and the report's sections that look into networks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from marks import fast

import bilevel_at as ba
from bilevel_at import diagnose
from bilevel_at import run as run_module
from bilevel_at.evaluate import ATTACKS, attack_from_name
from bilevel_at.evaluate.checks import LIMITS
from bilevel_at.report import report

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text()


def test_every_attack_and_warning_is_on_the_page():
    for names in ATTACKS:
        for name in names.split(", "):
            assert f"`{name}" in PAGE, name
    for name in LIMITS:
        assert f"`{name.removesuffix('-after-all').replace('square', 'black-box')}`" in PAGE, name
    for name in re.findall(r"^\| `(\w+)`(?:, `(\w+)`)?(?:, `(\w+)`)? \| (?:does|what|which|how)", PAGE, re.M):
        assert all(hasattr(diagnose, part) for part in name if part), name


def test_every_name_on_the_page_is_an_attack():
    told = re.findall(r"`((?:pgd|beta|apgd|fab|autoattack|square|fgsm)[\w-]*)`", PAGE)
    assert {"pgd-50-10-any", "beta-30-top3", "beta-30-adam", "autoattack-rand"} <= set(told)
    for name in told:
        if name not in ("pgd-K-R", "beta-K-R"):
            assert attack_from_name(name, 0.1).stages


def test_the_page_s_example_runs(capsys):
    (block,) = re.findall(r"```python\n(from bilevel_at.evaluate import evaluate\n.*?)```", PAGE, re.S)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    exec(block, {"model": model, "x": x, "y": y})
    shown = capsys.readouterr().out
    assert re.search(r"^pgd-50-10 +\d+\.\d\d%  \(n = 6\)$", shown, re.M)


NETWORKS = [("fastbat", "one_layer_cnn"), ("fgsm", "small_cnn")]


@pytest.mark.parametrize(("problem", "model"), fast(NETWORKS, NETWORKS[:1]))
def test_the_report_looks_into_the_network(problem, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--epochs", "2", "--examples", "100", "--attacks", "clean", "pgd-2-1", "--select", "pgd-2-1"]
    assert run_module.run([f"problems/{problem}.py", "--model", model, "--out", "out", *short]) == 0
    page = report(["out"]).read_text()
    drawn = {path.name for path in Path("out/report/figures").iterdir()}
    expected = {"landscape-0.png", "perturbations-0.png", "random-step.png", "gradient-norms-0.png"}
    assert expected <= drawn and ("implicit-0.png" in drawn) == (problem == "fastbat")
    assert ("filters-0.png" in drawn) == (model == "one_layer_cnn")
    assert "Not shown" not in page
    aligned = diagnose.gradient_alignment(ba.load("out"), _test().sample(256), ba.LinfBall(0.2)).nanmean().item()
    assert f">{aligned:.3f}<" in page and "best epoch" in page and "last epoch" in page
    chosen = report(["out"], "chosen", images=(17, 5)).read_text()
    assert "the mean loss of these 2 goes" in chosen
    assert "--images [360]; there are 360, from 0 on" in report(["out"], "chosen", images=(5, 360)).read_text()
    assert "landscape-0" not in report(["out"], "quick", measure=False).read_text()
    assert not Path("quick/figures/landscape-0.png").exists()


def _test():
    from bilevel_at.data import load_data

    return load_data("digits")[1]
