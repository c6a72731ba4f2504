"""The best network for a few minutes of two cores: what is chosen, how long runs are, and the smallest of all runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from benchmarking import FOLDER, script

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.train import Trainer

pytestmark = pytest.mark.usefixtures("small_cifar10")
FLAGS = ["--data-dir", "data", "--model", "one_layer_cnn", "--held-out", "10", "--test-examples", "6", "--jobs", "1"]
FLAGS += ["--folder", "runs", "--write", "results"]


def calibrated(speedrun, path, seconds):
    """A calibration with these seconds of a step, for the smallest runs."""
    row = {"beside": None, "date": "2026-01-02", "device": "a CPU", "torch": "2"}
    jobs = {name: speedrun.job_of(speedrun.COMPOSITIONS[name], "one_layer_cnn", 10, None) for name in seconds}
    rows = {name: {"job": shlex.join(jobs[name]), "seconds": [s], **row} for name, s in seconds.items()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))


@pytest.mark.slow
def test_runs_are_as_long_as_the_calibration_says_and_are_not_repeated():
    speedrun = script("speedrun_cpu")
    chosen = ["--compositions", "Fast-AT", "remembered, QUB", "--budgets", "0.5"]
    calibrated(speedrun, Path("results/speedrun.calibration.json"), {"Fast-AT": 20.0, "remembered, QUB": 100.0})
    assert speedrun.command([*FLAGS, *chosen, "--no-autoattack"]) == 0
    lines = script("trials").read(Path("results/speedrun.jsonl"))
    # 50 images are one step; half a minute of two cores is 60 s.
    assert {key: len(line["epochs"]["train"]) for key, line in lines.items()} == {
        "0.5-minutes-Fast-AT-0": 3,
        "0.5-minutes-remembered__QUB-0": 1,
    }
    assert [line["planned"] for line in lines.values()] == [60, 100]
    assert all(line["processor_seconds"] is not None and line["operations"] > 0 for line in lines.values())
    page = Path("results/speedrun.md").read_text()
    assert "no figure here is a result" in page and "1 seed: no difference between rows is claimed" in page
    assert re.search(r"^\| 0\.5 minutes \| (Fast-AT|remembered, QUB) \| 0 \| – \([\d.]+\) \| – \(", page, re.M)
    trained = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/processor-seconds.txt")}
    assert len(trained) == 2 and speedrun.command([*FLAGS, *chosen]) == 0
    assert trained == {path: path.stat().st_mtime_ns for path in trained}
    page = Path("results/speedrun.md").read_text()
    assert re.search(r"^\| Fast-AT: `problems/fastat.py` \| 3 \| 60 \| \d+ \| 0( \| [\d.]+){4} \| ", page, re.M)
    assert "A dash" in page and "– (" not in page
    Path("results/speedrun.md").unlink()
    assert speedrun.command([*FLAGS, *chosen, "--page-only"]) == 0 and Path("results/speedrun.md").read_text() == page


@pytest.mark.slow
def test_seconds_of_a_step_are_measured_once():
    speedrun, steps = script("speedrun_cpu"), script("speedrun_cpu_steps")
    jobs = {
        name: speedrun.job_of(speedrun.COMPOSITIONS[name], "one_layer_cnn", 10, None) for name in ("Fast-AT", "ATAS")
    }
    train, _ = load_data("cifar10", "data")
    path = Path("results/speedrun.calibration.json")
    rows = steps.calibrate(jobs, train, path)
    assert list(rows) == ["Fast-AT", "ATAS"] and all(len(row["seconds"]) == steps.REPEATS for row in rows.values())
    assert all(0 < second < 60 for row in rows.values() for second in row["seconds"])
    assert steps.calibrate(jobs, train, path) == rows == json.loads(path.read_text())


def test_a_later_composition_is_scaled_by_the_first(monkeypatch):
    speedrun, steps = script("speedrun_cpu"), script("speedrun_cpu_steps")
    path = Path("results/speedrun.calibration.json")
    calibrated(speedrun, path, {"Fast-AT": 2.0, "ATAS": 3.0})
    before = steps.read(path)
    jobs = {name: speedrun.job_of(speedrun.COMPOSITIONS[name], "one_layer_cnn", 10, None) for name in ("ATAS", "PGD-7")}
    asked = []

    def measure(jobs, train):
        asked.append(list(jobs))
        return {"Fast-AT": [1.0, 4.0, 5.0], "PGD-7": [8.0, 9.0, 30.0]}  # the machine is half as fast

    monkeypatch.setattr(steps, "measure", measure)
    rows = steps.calibrate(jobs, None, path)
    assert asked == [["Fast-AT", "PGD-7"]]
    assert {name: rows[name] for name in before} == before
    assert rows["PGD-7"]["seconds"] == [4.0, 4.5, 15.0] and rows["PGD-7"]["beside"] == "Fast-AT"
    assert steps.seconds_of(rows["PGD-7"]) == 4.5


def test_as_many_whole_epochs_as_fit_and_at_least_one():
    epochs_in = script("speedrun_cpu").epochs_in
    assert [epochs_in(600, 387, step) for step in (0.0905, 0.29, 1.0, 2.0)] == [17, 5, 1, 1]


def test_mistakes_are_told():
    speedrun = script("speedrun_cpu")
    for mistake, message in (
        (["--compositions", "PGD"], "--compositions PGD is not known; choose from Fast-AT"),
        (["--budgets", "5", "0"], "--budgets is 0"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--page-only", "--write", "results"], "speedrun.jsonl has no lines; train first"),
    ):
        with pytest.raises(ba.InputError, match=message):
            speedrun.command(mistake)


def line(name, seed, held_out, test, **results):
    scores = {attack: {"accuracy": value, "n": 1000} for attack, value in {"nearest-40-3-2": test, **results}.items()}
    return {
        "composition": name,
        "text": f"{name}.py",
        "budget": 5.0,
        "seed": seed,
        "planned": 590.0,
        "held_out": 500,
        "proof": False,
        "results": {"clean": {"accuracy": 0.6, "n": 1000}, **scores},
        "epochs": {"robust": [0.9, held_out]},
        "operations": 1e14,
        "processor_seconds": 580.0,
    }


def test_held_out_images_choose_and_test_images_do_not(monkeypatch):
    columns, page = script("speedrun_cpu_columns"), script("speedrun_cpu_page")
    lines = [line("Fast-AT", 0, 0.30, 0.45), line("ATAS", 0, 0.36, 0.33), line("PGD-7", 0, 0.33, 0.40)]
    (column,) = columns.columns_of(lines, ["Fast-AT", "ATAS", "PGD-7", "Fast-BAT"])
    assert column.best == "ATAS" and column.lacks == "1 of 4 compositions are not trained yet"
    # Of 500 images 36 % and 33 % have standard errors of 2.15 and 2.10 points, their difference 3.0.
    assert column.error("ATAS") == pytest.approx(2.147, abs=1e-3)
    assert column.error("ATAS", "nearest-40-3-2") == pytest.approx(1.487, abs=1e-3)
    assert column.level == ["PGD-7"] or column.level == ["Fast-AT", "PGD-7"]
    (wide,) = columns.columns_of([line("Fast-AT", 0, 0.30, 0.45), line("ATAS", 0, 0.40, 0.33)], ["Fast-AT", "ATAS"])
    assert wide.lacks == "" and wide.level == []
    (more,) = columns.columns_of([*wide.records, line("ATAS", 1, 0.4, 0.3)], ["Fast-AT", "ATAS"])
    assert more.lacks == "not all rows have 2 seeds yet"
    text = page.page([column], {})
    assert "| 5 minutes | ATAS (1 of 4 compositions are not trained yet) | 100 | – (33.0) | – (45.0) | " in text
    assert "| Fast-AT: `Fast-AT.py` | 2 | 590 | 580 | 100 | 30.0 | 60.0 | 45.0 | – | -12.0 |" in text


def test_baselines_and_the_better_half_of_the_others_go_on():
    columns = script("speedrun_cpu_columns")
    names = ["Fast-AT", "Fast-BAT", "ATAS", "a", "b", "PGD-7"]
    held_out = {"Fast-AT": 0.1, "Fast-BAT": 0.3, "ATAS": 0.2, "a": 0.2, "b": 0.25, "PGD-7": 0.4}
    lines = [line(name, 0, value, 1 - value) for name, value in held_out.items()]
    lines += [{**line(name, 0, 0.5, 0.5), "budget": 15.0} for name in ("ATAS", "PGD-7", "b")]
    short, long = columns.columns_of(lines, names)
    assert short.names == names and columns.advancing(short) == long.names == [
        "Fast-AT",
        "Fast-BAT",
        "ATAS",
        "b",
        "PGD-7",
    ]
    assert short.lacks == "" and long.lacks == "2 of 5 compositions are not trained yet"
    assert columns.advancing(long) == ["Fast-AT", "ATAS", "b", "PGD-7"]  # of what was trained


def test_readme_says_what_the_page_says():
    readme, page = (FOLDER.parent / name for name in ("README.md", "docs/results/speedrun.md"))
    text = readme.read_text(encoding="utf-8").split("**For five minutes of two cores**")[1].split("\n\n")[0]
    numbers, lines = re.findall(r"\d+\.\d ± \d+\.\d", text), page.read_text(encoding="utf-8")
    assert len(numbers) == 5 and all(re.search(rf"(?<![\d.]){re.escape(number)}", lines) for number in numbers)


def test_differences_are_paired_by_seed_and_a_failure_is_a_row():
    columns, page = script("speedrun_cpu_columns"), script("speedrun_cpu_page")
    lines = [line("Fast-AT", seed, 0.3, test, autoattack=test) for seed, test in enumerate((0.30, 0.34, 0.32))]
    lines += [line("ATAS", seed, 0.4, test, autoattack=test) for seed, test in enumerate((0.32, 0.36, 0.35))]
    broken = {"composition": "PGD-7", "text": "p.py", "budget": 5.0, "seed": 0, "proof": False, "held_out": 500}
    (column,) = columns.columns_of([*lines, {**broken, "failed": "the loss is nan"}], ["Fast-AT", "ATAS", "PGD-7"])
    text = page.page([column], {})
    assert "chosen less this, AutoAttack" in text and "no difference between rows is claimed" not in text
    assert "| 32.0 ± 2.0 | 32.0 ± 2.0 | **+2.3 ± 0.3** |" in text  # 2, 2, 3: 0.577/√3
    assert "| PGD-7: `p.py` | failed, seed 0: the loss is nan | – |" in text


def test_processor_seconds_of_epochs_that_were_stopped_add_up(monkeypatch):
    trials, path = script("trials"), Path("seconds.txt")

    def train_epoch(self, epoch):
        if self == "stopped":
            raise KeyboardInterrupt
        return {"epoch": epoch}

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    monkeypatch.setattr(trials.time, "process_time", iter((0.0, 2.0, 10.0, 11.5, 20.0, 20.25)).__next__)
    with trials.processor_seconds(path):
        assert Trainer.train_epoch("whole", 0) == {"epoch": 0}
    with pytest.raises(KeyboardInterrupt), trials.processor_seconds(path):
        Trainer.train_epoch("stopped", 1)
    assert Trainer.train_epoch is train_epoch
    assert trials._processor_seconds(path, 2) == 3.5
    with trials.processor_seconds(path):
        Trainer.train_epoch("whole", 1)
    assert trials._processor_seconds(path, 2) == 3.8 and trials._processor_seconds(path, 3) is None
    assert trials._processor_seconds(Path("none.txt"), 1) is None
