"""The headline is the worst case of all attacks made, and equal weights are attacked once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluating_runs import QUICK, arrays, evaluate, read
from reporting import entry, made, make

from bilevel_at.evaluate import stages
from bilevel_at.runs.record import headline


def test_the_headline_is_the_union_of_all_attacks_of_all_commands(run_here, capsys):
    evaluate("run", "--which", "last", "--examples", 60, "--attacks", "clean", "fgsm", "beta-2", *QUICK)
    capsys.readouterr()
    evaluate("run", "--which", "last", "--examples", 60, "--attacks", "pgd-3-1", *QUICK)
    shown = capsys.readouterr().out
    names = ("fgsm", "beta-2", "pgd-3-1")
    union = np.logical_and.reduce([arrays(f"run/evaluation/last/{name}.npz")["correct"] for name in names]).mean()
    worst = headline("run", "last")
    assert worst.accuracy == pytest.approx(union) and set(worst.attacks) == set(names) and worst.n == 60 and worst.exact
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert "worst case of all" in rows[0] and f"{union:.1%}" in rows[0]
    assert all(name in " ".join(shown.split("worst case of ")[-1].split()) for name in names)
    evaluate("run", "--which", "last", "--examples", 20, "--attacks", "fgsm", *QUICK)
    assert headline("run", "last") == worst  # of fewer images


def test_without_outcomes_it_is_the_least_accuracy(elsewhere):
    make("r", results={"best": {"clean": entry(0.9, 0.0), "pgd-50-10": entry(0.5), "square": entry(0.45)}})
    worst = headline("r")
    assert worst.accuracy == 0.45 and not worst.exact and set(worst.attacks) == {"pgd-50-10", "square"}
    make("c", results={"best": {"clean": entry(0.9, 0.0)}})
    assert headline("c") is None
    text = made(Path("r")).said
    assert (
        "keeps 45.0% in the worst case of 2 attacks (pgd-50-10, square)" in text and "least of their accuracies" in text
    )


def test_equal_weights_are_attacked_once(run_here, monkeypatch):
    shutil.copy("run/last.pt", "run/best.pt")
    calls = []
    plain = stages.Descent.__call__
    monkeypatch.setattr(stages.Descent, "__call__", lambda self, *a: (calls.append(1), plain(self, *a))[1])
    flags = ["--examples", 30, "--attacks", "clean", "pgd-3-1", *QUICK]
    evaluate("run", "--which", "best", *flags)
    once = len(calls)
    evaluate("run", "--which", "best", "last", *flags)
    assert len(calls) == once > 0
    results = read("run/results.json")
    for name in ("clean", "pgd-3-1"):
        best, last = (results[which][name] for which in ("best", "last"))
        assert {**best, "file": ""} == {**last, "file": ""} and best["file"] != last["file"]
        first, second = (arrays(Path("run", row["file"])) for row in (best, last))
        assert all(np.array_equal(first[key], second[key]) for key in first)
    evaluate("run", "--which", "best", "last", *flags, "--again")
    assert len(calls) == 2 * once
