"""The report: what was trained, commands that repeat it, several seeds as one training, captions of what is drawn."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from reporting import PIXEL, entry, epochs, made, make, row
from running import ROOT

from bilevel_at import run as run_module
from bilevel_at.commands.evaluate import command as evaluate
from bilevel_at.commands.settings import lower_settings
from bilevel_at.problems import atas, fastbat, minmax, subat
from bilevel_at.report import report
from bilevel_at.report.repeat import _packaged, commands
from bilevel_at.report.settings import facts
from bilevel_at.runs.record import read, read_all

pytestmark = pytest.mark.usefixtures("elsewhere")

KKT = {"name": "HessianFreeKKT", "ig_weight": 0.005, "damping": 0.0}
TAYLOR = {"name": "Linearized", "anchor": "Steps(start=Uniform)", "direction": "taylor", "step": 20.0, "mode": "train"}
SHORT = ["--examples", "100", "--test-examples", "50", "--attacks", "clean", "pgd-2-1", "--select", "pgd-2-1"]


def test_the_lower_level_in_words():
    assert lower_settings(fastbat.problem(0.2).lower) == {
        "name": "Linearized",
        "anchor": "Steps(start=Uniform(radius=0.2), direction=taylor, step=2000/255)",
        "direction": "taylor",
        "step": 2000 / 255,
        "mode": "train",
    }
    ours = lower_settings(atas.problem(8 / 255).lower)
    assert ours["anchor"].startswith("Remembered(start=Uniform") and ours["step"].startswith("Adaptive(gamma=")
    assert lower_settings(minmax.problem(8 / 255, steps=10).lower)["anchor"].endswith("count=9)")
    for problem in (subat.problem(8 / 255), atas.problem(0.1), fastbat.problem(0.1)):
        assert " at 0x" not in json.dumps(lower_settings(problem.lower))  # the same for every process


def test_the_head_states_what_was_trained():
    run = make("a", solver=KKT, lower=TAYLOR, options={"batch_size": 64, "accumulate": 2})
    text = made(run)
    for name, value in (
        ("solver", "HessianFreeKKT"),
        ("anchor", "Steps(start=Uniform)"),
        ("direction", "taylor"),
        ("step", "20"),
        ("implicit weight", "0.005"),
        ("batch size", "2 × 64"),
    ):
        assert name + value in text.said
    assert "What was trained" not in text.said  # one training: the head has it all
    old = make("old", solver=KKT, problem={"epsilon": 0.2, "step": 20.0, "anchor": "gradient-step"})
    assert facts(read(old)) == {
        "solver": "HessianFreeKKT",
        "implicit weight": "0.005",
        "anchor": "gradient-step",
        "step": "20",
    }


def test_settings_in_which_trainings_differ_are_a_table():
    a = make("a", solver=KKT, lower=TAYLOR, options={"batch_size": 64})
    b = make("b", file="problems/fastat.py", lower={**TAYLOR, "direction": "sign"}, options={"batch_size": 64})
    text = made(a, b)
    assert "batch size64" in text.said and "What was trained" in text.said
    assert ["training", "solver", "implicit weight", "direction"] in text.rows
    assert ["HessianFreeKKT", "0.005", "taylor"] in [cells[1:] for cells in text.rows]
    assert ["ZeroIG", "–", "sign"] in [cells[1:] for cells in text.rows]


def test_what_a_real_run_has():
    assert run_module.run(["fastbat", "--epochs", "1", "--out", "r", *SHORT]) == 0
    known = facts(read("r"))
    assert known["anchor"] == "Steps(start=Uniform(radius=0.2), direction=taylor, step=20)"
    assert (known["solver"], known["direction"], known["step"], known["batch size"]) == (
        "HessianFreeKKT",
        "taylor",
        "20",
        "64",
    )
    assert known["implicit weight"] == "0.005"


def words(page):
    """The commands of a page."""
    code = re.search(r"How to repeat</h2>.*?<code>(.*?)</code>", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    return [shlex.split(line.replace("&#x27;", "'").replace("&amp;", "&")) for line in code.splitlines()]


def accuracies(folder):
    results = json.loads((folder / "results.json").read_text())
    return {which: {name: e["accuracy"] for name, e in entries.items()} for which, entries in results.items()}


@pytest.mark.slow
def test_commands_repeat_the_page_in_a_fresh_directory(tmp_path):
    """Runs made in several directories, one of a problem file of its own, one evaluated from elsewhere."""
    own = (ROOT / "problems" / "fastat.py").read_text(encoding="utf-8") + "\n# mine\n"
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine.py").write_text(own)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for seed in ("0", "1"):
            assert run_module.run(["fastbat", "--epochs", "2", "--seed", seed, *SHORT]) == 0
        assert run_module.run(["mine.py", "--epochs", "1", "--out", "odd name", "--resume", "auto", *SHORT]) == 0
        patch.chdir(here / "runs")
        first = "fastbat-digits-seed0"
        attacks = ["--attacks", "pgd-3-1", "transfer:fastbat-digits-seed1:fgsm", "--checks", "0", "--examples", "40"]
        assert evaluate([first, *attacks]) == 0
        runs = [first, "fastbat-digits-seed1", "../odd name"]
        page = report(runs, "page", measure=False).resolve()
        runs = [Path(run).resolve() for run in runs]
    made_by = words(page)
    assert "mine.py" in page.read_text(encoding="utf-8").split("How to repeat</h2>")[1].split("<pre")[0]
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "mine.py").write_text(own)
    assert made_by[-1][:3] == ["python", "-m", "bilevel_at.report"]
    for line in made_by[:-1]:
        done = subprocess.run([sys.executable, *line[1:]], cwd=fresh, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, *made_by[-1][1:], "--no-measure"], cwd=fresh, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for run in runs:
        again = accuracies(fresh / "runs" / run.name)
        ours = accuracies(run)
        rename = {n.replace("fastbat-digits-seed1", "runs/fastbat-digits-seed1"): v for n, v in ours["best"].items()}
        assert again["best"] in (ours["best"], rename)
    assert (fresh / "runs" / "report" / "index.html").is_file()


def test_runs_of_one_name_get_names_of_their_own():
    a, b = make("x/run", seed=0), make("y/run", seed=1)
    (a / "evaluation").mkdir()
    (a / "evaluation" / "commands.json").write_text(
        json.dumps([["bilevel_at.evaluate", "elsewhere/run", "--attacks", "fgsm"]])
    )
    lines, needed = commands(read_all([a, b]), _packaged())
    assert lines == [
        "python -m bilevel_at.run fastat.py --seed 0 --out runs/run",
        "python -m bilevel_at.run fastat.py --seed 1 --out runs/run-2",
        "python -m bilevel_at.evaluate runs/run --attacks fgsm",
        "python -m bilevel_at.report runs/run runs/run-2",
    ]
    assert needed == ["fastat.py"]


def test_several_seeds_read_as_one():
    runs = [
        make(f"seed{seed}", seed=seed, metrics=epochs(implicit_ratio=0.1 + seed / 10, implicit_cosine=0.5))
        for seed in range(3)
    ]
    for run in runs:
        warning = {"name": "masked", "message": f"a warning, of {run.name[-1]}"}
        (run / "checks.json").write_text(json.dumps({"best": {"warnings": [warning], "network": {"pgd": 1.0}}}))
    text = made(*runs)
    assert text.said.count("a warning, of") == 1
    assert "fastat, seeds 0, 1, 2 (3 of 3 runs), best checkpoint:" in text.said.replace("Fastat", "fastat")
    assert row(text, "fastat 3 seeds")
    assert "is 0.2 ± 0.1 of the direct gradient's length" in text.said
    before = text.said.split("How to repeat")[1]  # the first is in the list of sections
    assert "(In the words of seed 0.)" in before
    assert not re.search(r"\bseed[012]\b", before)  # no run's own name
    assert "in fastat" not in before.split("Thick: mean")[1].split("Best against")[0]


def test_captions_say_what_is_drawn(drawn):
    text = made(make("a", metrics=epochs(alignment=0.9)), make("b", seed=1, metrics=epochs(alignment=0.8)))
    training = text.said.split("Thick: mean over 2 seeds; thin: each seed.")
    assert len(training) == 2 and "The lowest gradient alignment of any epoch is 0.85." in training[1]
    bare = [{k: v for k, v in line.items() if k not in ("train", "alignment")} for line in epochs()]
    text = made(make("c", metrics=bare), make("d", seed=1, metrics=bare), out="bare")
    assert "training examples" not in text.said and "alignment" not in text.said


def test_results_of_pictures_are_over_all_seeds():
    results = [{"best": {"clean": entry(0.9, 0.0), "pgd-50-10": entry(a)}} for a in (0.5, 0.7)]
    runs = [
        make(f"p{seed}", seed=seed, results=r, options={"attacks": ["clean", "pgd-50-10"]})
        for seed, r in enumerate(results)
    ]
    (runs[0] / "figures").mkdir()
    (runs[0] / "figures" / "examples.png").write_bytes(PIXEL)
    text = made(*runs)
    assert "Of all test images 40.0 ± 14.1% are answered wrongly under pgd-50-10, over 2 seeds." in text.said
    assert "fastat, seed 0, best epoch: test images" in text.said
