"""``--help``: groups, units, defaults on each data set, an example; and what it must not load."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from running import PROBLEMS, ROOT

from bilevel_at import run as run_module
from bilevel_at.commands import evaluate, report
from bilevel_at.commands.flags import flags_of
from bilevel_at.commands.helping import shown_value, table
from bilevel_at.commands.options import EVALUATE_GROUPS, RUN_GROUPS, UNITS, EvaluateOptions, RunOptions
from bilevel_at.report.diagnosis import FIRST_IMAGES
from bilevel_at.runs.problem_file import ProblemFile


def help_of(capsys, command, *args):
    with pytest.raises(SystemExit) as end:
        command([*args, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def groups_in(shown):
    """Title -> the flags below it."""
    found, title = {}, ""
    for line in shown.split("defaults on each data set")[0].splitlines():
        if match := re.match(r" (?:(\w+) )?options\s*$", line):
            title = match[1] or ""
        elif match := re.match(r"  (--[a-z][\w-]*)", line):
            found.setdefault(title, set()).add(match[1][2:].replace("-", "_"))
    return found


@pytest.mark.parametrize("name", ["fastbat", "standard", "atas"])
def test_every_flag_of_run_is_in_a_group(capsys, name):
    shown = help_of(capsys, run_module.run, name)
    groups = groups_in(shown)
    assert list(groups) == ["problem", "solver", "training", "data", "output"]
    assert "epsilon" in groups["problem"] and "ig_weight" in groups["solver"] or name != "fastbat"
    own = set().union(*groups.values())
    assert {flag.name for flag in flags_of(RunOptions)} <= own
    for group, names in RUN_GROUPS.items():
        assert set(names) <= groups[group]
    assert (
        "--epochs EPOCHS" in shown and "--save-every MINUTES" in shown and "%%" not in shown and ":class:" not in shown
    )
    assert f"example:\n  python -m bilevel_at.run {name} --data cifar10" in shown


def test_the_example_is_a_command(capsys):
    shown = help_of(capsys, run_module.run, "fastbat")
    words = shown.split("python -m bilevel_at.run ")[-1].split()
    out = words.index("--out")
    assert words[out + 1] == "runs/mine"
    from bilevel_at.commands.plan import understand

    plan = understand(words[: out + 2])
    assert (plan.options.epochs, plan.options.data, plan.problem_arguments["epsilon"]) == (30, "cifar10", 8 / 255)


def test_defaults_of_each_data_set_are_what_the_recipes_say():
    lines = table(ProblemFile("fastbat"))
    head = re.split(r"\s{2,}", lines[0].strip())
    assert head[0] == "digits" and "cifar10 …" in head
    rows = {
        cells[0]: dict(zip(head, cells[1:], strict=True))
        for cells in (re.split(r"\s{2,}", s.strip()) for s in lines[1:-1])
    }
    for data in ("digits", "cifar10", "svhn", "imagenet"):
        recipe = ProblemFile("fastbat").recipe(data)
        column = next(name for name in head if name.split()[0] == data)
        assert rows["--epochs"][column] == str(recipe.epochs)
        assert rows["--model"][column] == recipe.model
        assert rows["--lr"][column] == f"{recipe.lr:g}"
    assert rows["--epsilon"]["digits"] == "0.2" and rows["--epsilon"]["cifar10 …"] == "8/255"
    assert lines[-1].strip() == "cifar10 …: cifar10, cifar100, tiny_imagenet"


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_has_a_table(name):
    assert any("--model" in line for line in table(ProblemFile(name)))


def test_defaults_are_those_of_the_data_set_asked_for(capsys):
    shown = " ".join(help_of(capsys, run_module.run, "fastbat", "--data", "cifar10").split())
    assert "passes over the training set. (default: 20)" in shown and "--augment" in shown


def test_a_solver_shows_its_own_defaults(capsys):
    shown = " ".join(help_of(capsys, run_module.run, "fastbat").split())
    assert "Published Fast-BAT uses 0.1·λ. (default: 0.005)" in shown  # 0.1 / 20


def test_every_unit_is_of_a_flag():
    known = {flag.name for kind in (RunOptions, EvaluateOptions) for flag in flags_of(kind)}
    assert set(UNITS) <= known | {"images"}
    assert {name for names in EVALUATE_GROUPS.values() for name in names} <= known


def test_evaluate_and_report(capsys):
    shown = help_of(capsys, evaluate.command, "RUN")
    groups = groups_in(shown)
    assert list(groups) == ["attack", "data", "network", "output"]
    assert {flag.name for flag in flags_of(EvaluateOptions)} == set().union(*groups.values())
    assert shown.count("python -m bilevel_at.evaluate runs/") == 2
    assert evaluate.command(["--help"]) == 0
    assert "--attacks" in capsys.readouterr().out
    shown = help_of(capsys, report.command)
    assert "examples:\n  python -m bilevel_at.report runs/" in shown and "POSITION" in shown
    assert report._options.__defaults__[2] == FIRST_IMAGES  # which is not imported there


@pytest.mark.parametrize(
    "args", [("run", "--help"), ("evaluate", "--help"), ("report", "--help")], ids=lambda args: args[0]
)
def test_help_loads_nothing_that_is_slow(args):
    """``--help`` takes what ``import torch`` takes, and little more."""
    code = f"""
import contextlib, io, runpy, sys
sys.argv = ["x", *{list(args[1:])!r}]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    runpy.run_module("bilevel_at.{args[0]}", run_name="__main__")
heavy = {{"torchvision", "matplotlib", "scipy", "sklearn", "pyautoattack", "tensorboard", "wandb", "safetensors"}}
print(*{{name.split(".")[0] for name in sys.modules}} & heavy)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.split() == [], done


def test_values_in_help():
    assert [shown_value(v) for v in (8 / 255, 0.2, 1e-4, None, (15, 18), (), 3, True)] == [
        "8/255",
        "0.2",
        "0.0001",
        "none",
        "15 18",
        "none",
        "3",
        "True",
    ]


def test_a_file_of_a_users_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "from bilevel_at.problems import fastat\ndef problem(radius: float = 0.1):\n    return fastat.problem(radius)\n"
    )
    shown = help_of(capsys, run_module.run, "own.py")
    assert groups_in(shown)["problem"] == {"radius"} and "--epsilon 8/255" not in shown
