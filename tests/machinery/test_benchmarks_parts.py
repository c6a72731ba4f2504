"""Parts exchanged one at a time: the rows are what they say, differences have the right error, and runs go on."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarking import FOLDER, script
from running import ROOT

import bilevel_at as ba
from bilevel_at.commands.plan import understand

sys.path.insert(0, str(FOLDER))
from differences import best_by_luck, mean_and_spread, paired
from parts_rows import COMPOSITIONS, PARTS, ROWS

pytestmark = pytest.mark.usefixtures("small_cifar10")


def exchanged(a, b):
    """What differs between two rows: words of their flags."""
    return set(a.flags.split()) ^ set(b.flags.split())


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_command_and_is_compared_with_a_row(name):
    row = ROWS[name]
    assert understand(["problems/composed.py", *row.of(8 / 255, 10), "--out", "out"]).problem is not None
    if row.beside:
        assert row.beside in ROWS and exchanged(row, ROWS[row.beside])
    else:
        assert row.flags == ""


def test_rows_differ_from_their_neighbours_by_one_part():
    """By one flag with its value, or by what goes with it: an anchor of steps and the steps' direction."""
    together = [{"--solver", "--inner"}, {"--solver", "--ig-factor"}, {"--solver", "--ig-weight"}]
    together += [{"--solver", "--damping"}, {"--steps", "--step"}, {"--upper", "--weight"}]
    for row in PARTS[1:]:
        flags = {word for word in exchanged(row, ROWS[row.beside]) if word.startswith("--")}
        assert len(flags) <= 1 or flags in together, (row.name, flags)
    for row in COMPOSITIONS:
        flags = {word for word in exchanged(row, ROWS[row.beside]) if word.startswith("--")}
        assert len(flags) == 1, (row.name, flags)


def test_multiples_of_epsilon_and_of_the_epochs():
    assert ROWS["step 1.25 ε"].of(0.2, 30) == ["--step", "0.25"]
    assert ROWS["remembered, QUB, 1.4 × the epochs"].of(0.2, 30)[-1] == "42"
    assert ROWS["one-cycle rate"].of(0.2, 30) == ["--schedule", "one-cycle"]


def test_the_error_of_a_difference():
    a, b = {0: 70.0, 1: 72.0, 2: 71.0, 3: 90.0}, {0: 69.0, 1: 69.0, 2: 69.0}
    gap = paired(a, b)
    assert (gap.mean, gap.n) == (2.0, 3) and gap.error == pytest.approx(1 / math.sqrt(3))
    assert gap.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # Student's t, two degrees of freedom
    assert not gap.clear and str(gap) == "+2.0 ± 0.6"
    assert str(paired({0: 9.0, 1: 9.1, 2: 9.2}, {0: 1.0, 1: 1.0, 2: 1.0})) == "**+8.1 ± 0.1**"
    assert paired({0: 1.0}, {1: 1.0}) is None
    alone = paired({0: 2.0}, {0: 1.5})
    assert math.isnan(alone.error) and not alone.clear and str(alone) == "+0.5"
    assert mean_and_spread({}) == "–" and mean_and_spread({0: 1.0, 1: 2.0}) == "1.5 ± 0.7"


def test_the_best_of_many_by_luck():
    draws = np.random.default_rng(0).normal(0, 2.0, (40_000, 12)).max(1)
    for quantile in (0.5, 0.95):
        assert best_by_luck(12, 2.0, quantile) == pytest.approx(np.quantile(draws, quantile), abs=0.05)


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [("README.md", "**What each part is worth**", "\n\n"), ("docs/methods.md", "## Which one?", "\n## ")],
)
def test_readme_and_methods_say_what_the_page_says(name, start, end):
    text = (ROOT / name).read_text(encoding="utf-8").split(start)[1].split(end)[0]
    lines = (ROOT / "docs/results/parts.md").read_text(encoding="utf-8").split("## CIFAR-10")[0]
    numbers = re.findall(r"-?\d+\.\d ± \d+\.\d", text)
    assert len(numbers) == 3 and all(re.search(rf"(?<![\d.]){re.escape(number)}", lines) for number in numbers)
    for title, better in (("Fast-BAT", 12), ("ATAS, twice the epochs", 0)):
        line = rf"costs: 39\. Better than {title} \(cost [\d.]+\) under nearest: \*\*{better}\*\*"
        assert re.search(line, lines)


@pytest.mark.slow
def test_parts_are_trained_attacked_and_written(monkeypatch):
    parts = script("parts")
    rows = ["implicit term × 0.1 (Fast-BAT)", "remembered, adaptive", "one sign step", "remembered"]
    attacks = {"clean": 10, "pgd-50-10": 4, "nearest-40-3-2": 4, "autoattack": 2}
    short = "--data digits --examples 60 --test-examples 20 --epochs 1"
    monkeypatch.setitem(
        parts.SETTINGS, "digits", replace(parts.SETTINGS["digits"], attacks=attacks, flags=short, seeds=2)
    )
    flags = ["--sets", "digits", "--rows", *rows, "--seeds", "2", "--folder", "runs", "--write", "results"]
    assert parts.command([*flags, "--jobs", "2"]) == 0
    lines = [json.loads(line) for line in Path("results/parts.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(line["results"]["autoattack"]["n"] == 2 for line in lines)
    assert all(line["operations"] > 0 and len(line["epochs"]["robust"]) == 1 for line in lines)
    page, method = (Path(f"results/{name}.md").read_text() for name in ("parts", "parts-method"))
    for row in rows:
        assert re.search(rf"^\| {re.escape(row)} \| .* \| [\d.]+ \| ", page, re.M)
    assert "- Held-out images choose **" in page and "held-out images choose **" in method and "points above" in method
    assert Path("results/parts.png").read_bytes()[:4] == b"\x89PNG"

    monkeypatch.setattr(parts, "perform_all", lambda trials, *more: [stop(t, lines) for t in trials])
    assert parts.command(flags) == 0  # every run is there: nothing is trained again
    with pytest.raises(ba.InputError, match="--rows PGD-3 is not known; choose from one sign step"):
        parts.command(["--rows", "PGD-3"])
    with pytest.raises(ba.InputError, match="--seeds is 0; it must be at least 1"):
        parts.command(["--seeds", "0"])


def stop(trial, lines):
    from trials import missing

    assert not missing(trial, {line["key"]: line for line in lines}), trial.key
