"""The report of runs that are old, damaged or not there, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from reporting import Text, complaint, entry, epochs, made, make, row

from bilevel_at.commands.report import command as main

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_old_runs_and_plain_checkpoints():
    old = epochs()
    for line in old:
        for key in ("train", "perturbation", "train_seconds", "implicit_ratio"):
            del line[key]
    results = {w: {"pgd-50-10": {"accuracy": 0.5, "n": 100, "epsilon": 0.2, "seconds": 1}} for w in ("best", "last")}
    a = make("old", metrics=old, results=results, machine={}, versions={})
    plain = Path("checkpoint")
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"model": "small_cnn", "shape": [1, 8, 8], "classes": 10}))
    (plain / "results.json").write_text(json.dumps({"model": {"clean": entry(0.8, 0.0), "pgd-50-10": entry(0.3)}}))
    text = made(a, plain)
    assert row(text, "checkpoint 1 run")[1:4] == ["model", "80.0", "30.0"]
    assert row(text, "fastat")[2:4] == ["–", "50.0"]
    assert "50.0" in made(a, out="a").said
    said = made(plain, out="p").said
    assert "30.0%" in said and "Training" not in [s.strip() for s in said.splitlines()]


@pytest.mark.parametrize(
    "file, content, why",
    [
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "must be a JSON object"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epo\n', "not a file of JSON lines"),
        ("metrics.jsonl", "[1]\n", "line 1 is not an epoch"),
        ("results.json", '{"best": []}', "'best' is list"),
        ("results.json", '{"best": {"clean": {"accuracy": "x"}}}', "no accuracy between 0 and 1"),
        ("results.json", '{"best": {"clean": {"accuracy": 43.0}}}', "no accuracy between 0 and 1"),
        ("checks.json", "nope", "checks.json is not JSON"),
        ("evaluation/commands.json", '{"a": 1}', "not a list of commands"),
    ],
)
def test_damaged_files_are_one_line(file, content, why):
    run = make("r")
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_text(content)
    assert why in complaint(run) and not (run / "report").exists()


def test_mistakes_in_what_is_asked_are_one_line():
    run = make("r")
    Path("empty").mkdir()
    assert "no run is given" in complaint()
    assert "no run is given" in complaint("--out", "x")
    assert "there is no run nowhere" in complaint("nowhere")
    assert "not a run" in complaint("empty")
    assert "a run is a directory" in complaint(run / "config.json")
    assert "given twice" in complaint(run, run) and "given twice" in complaint(run, "./r/../r")
    assert "is a file" in complaint(run, "--out", run / "config.json")
    assert "--oot is not a flag" in complaint(run, "--oot", "x")
    assert "one argument too many" in complaint(run, "--out", "x", "y")


def test_where_it_goes_and_how_to_repeat_it(capsys):
    a, b = make("runs/a"), make("runs/b", seed=1)
    (a / "evaluation").mkdir()
    (a / "evaluation/commands.json").write_text(json.dumps([["bilevel_at.evaluate", "runs/a", "--attacks", "a b"]]))
    assert main([str(a)]) == 0 and (a / "report/index.html").is_file()
    assert "report/index.html" in capsys.readouterr().out
    assert main([str(a), str(b)]) == 0 and Path("runs/report/index.html").is_file()
    said = Text(Path("runs/report/index.html").read_text(encoding="utf-8")).said
    assert "python -m bilevel_at.run fastat.py --seed 1 --out runs/b" in said
    assert "python -m bilevel_at.evaluate runs/a --attacks 'a b'" in said
    assert "python -m bilevel_at.report runs/a runs/b" in said and "ab" * 32 in said and "2.9" in said
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0 and "--out" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_ends_with_2_for_a_mistake():
    done = subprocess.run([sys.executable, "-m", "bilevel_at.report", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("bilevel_at.report: there is no run")
