"""The page on catastrophic overfitting: its runs, its ROC curves, and words that follow from its numbers."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarking import FOLDER, script
from PIL import Image

import bilevel_at as ba

pytestmark = pytest.mark.usefixtures("small_cifar10")
ABOUT = {"date": "2026-01-01", "device": "a CPU", "versions": {"torch": "2", "python": "3"}}


def record(runs, method, epsilon, seed, collapse=None, warned=True, epochs=8):
    """A made-up run: alignment falls in the epoch before a collapse, where it is to warn; nothing else tells."""
    g = np.random.default_rng(1000 * seed + int(epsilon))
    lines = []
    for epoch in range(1, epochs + 1):
        fallen = collapse is not None and epoch >= collapse
        warns = warned and collapse == epoch + 1
        line = {"epoch": epoch, "robust": 0.0 if fallen else 0.3, "train": 0.9 if fallen else 0.4}
        line |= {"alignment": 0.1 if fallen or warns else 0.8 + 0.01 * epoch, "perturbation": 0.1, "attack": "pgd-10-1"}
        line |= {
            name: float(g.random()) for name in ("loss", "clean", "attacked", "gradient", "free", "share", "cosine")
        }
        lines.append(line)
    run = runs.Run(method, epsilon, seed, epochs)
    return {"key": run.key, "settings": run.settings, "epochs": lines, **ABOUT}


@pytest.fixture
def runs():
    return script("overfitting_runs")


def collapsing(runs, warned=True):
    """FGSM at three ε, and its neighbours at one, each in another epoch with another seed; the rest never."""
    where = [("fgsm", e, s, 3 + s) for e in (12, 16, 24) for s in range(3)]
    where += [(m, 24, s, 5 + s) for m in ("fastat", "fgsm-qub") for s in range(3)]
    others = [(m, 8, s, None) for m in runs.COMPOSITIONS for s in range(3)]
    return [record(runs, m, e, s, c, warned) for m, e, s, c in (*where, *others)]


def test_pairs_end_with_the_epoch_before_a_collapse(runs):
    warnings = script("overfitting_warnings")
    pairs = warnings.pairs_of([record(runs, "fgsm", 16, 0, 4), record(runs, "fastat", 16, 1)])
    assert [(p.method, p.line["epoch"], p.next, p.collapses) for p in pairs] == [
        *(("fgsm", epoch, epoch == 3, True) for epoch in (1, 2, 3)),
        *(("fastat", epoch, False, False) for epoch in range(1, 8)),
    ]
    values = {p.name: [p.value(pair) for pair in pairs[:3]] for p in warnings.predictors()}
    assert values["change of gradient alignment"] == [None, pytest.approx(0.01), pytest.approx(0.1 - 0.82)]
    losses = [pair.line["loss"] for pair in pairs[:3]]
    assert values["ratio of loss to the epoch before"][1:] == [losses[1] / losses[0], losses[2] / losses[1]]
    assert values["ε"] == [16] * 3 and values["training images − PGD-10"] == [pytest.approx(0.1)] * 3
    pairs[0].line["alignment"] = None  # not defined
    assert next(warnings.predictors()).value(pairs[0]) is None


def test_a_warning_is_beside_what_other_seeds_have_told(runs):
    warnings = script("overfitting_warnings")
    three = [record(runs, "fgsm", 16, seed, collapse) for seed, collapse in ((0, 4), (1, None), (2, 3))]
    pairs = warnings.pairs_of([*three, record(runs, "fgsm", 24, 0, 4)])
    *_, known = warnings.predictors(pairs)
    assert not known.measured
    values = {(pair.epsilon, pair.seed): known.value(pair) for pair in pairs}
    assert values == {(16, 0): 0.5, (16, 1): 1.0, (16, 2): 0.5, (24, 0): None}


def test_a_threshold_catches_nine_of_ten_and_is_tested_on_what_was_left_out(runs):
    warnings = script("overfitting_warnings")
    pairs = warnings.pairs_of(collapsing(runs))
    alignment, change, *_ = (warnings.Cases.of(p, pairs) for p in warnings.predictors())
    assert alignment.sign() == change.sign() == -1 and alignment.area(-1) == change.area(-1) == 1
    assert -0.1 - 1e-9 <= alignment.threshold() <= -0.1 + 1e-9
    tested = warnings.left_out(alignment, "seed")
    assert tested.areas == {0: 1, 1: 1, 2: 1} and (tested.caught, tested.positive, tested.false) == (15, 15, 0)
    assert tested.negative == len(pairs) - 15 and tested.alarmed == set() and len(tested.quiet) == 27
    # FGSM's threshold comes from the two others, and is no worse for that.
    by_method = warnings.left_out(alignment, "method")
    assert by_method.areas.keys() == {"fgsm", "fastat", "fgsm-qub"} and by_method.false_rate == 0
    assert by_method.quiet == tested.quiet

    positive = np.arange(40) % 2 == 0
    cases = warnings.Cases(pairs[:40], np.where(positive, np.arange(40), -1.0), positive)
    assert cases.threshold() == 4 and np.mean(cases.values[positive] >= 4) == 0.9
    # Shuffled, a direction that was chosen on the other seeds tells nothing.
    noise = warnings.Cases(pairs, np.random.default_rng(0).random(len(pairs)), alignment.positive)
    assert 0.3 < warnings.left_out(noise, "seed").area < 0.7


def test_a_threshold_that_does_not_carry_over_is_seen(runs):
    """With every seed's alignments ten apart, no threshold of the others fits the one that was left out."""
    warnings = script("overfitting_warnings")
    records = collapsing(runs)
    for line, seed in ((line, r["settings"]["seed"]) for r in records for line in r["epochs"]):
        line["alignment"] += 10 * seed
    pairs = warnings.pairs_of(records)
    tested = warnings.left_out(warnings.Cases.of(next(warnings.predictors()), pairs), "seed")
    assert set(tested.areas.values()) == {1.0} and (tested.caught, tested.positive) == (10, 15)
    assert tested.false == sum(not pair.next for pair in pairs if pair.seed < 2)  # everything of seeds 0 and 1


def test_the_page_says_what_warns(runs, tmp_path, drawn):
    page = script("overfitting_page")
    page.write_page(collapsing(runs), tmp_path, "a command")
    text = (tmp_path / "overfitting.md").read_text()
    assert "FGSM from 0 12/255; Fast-AT, uniform start 24/255; FGSM from 0, QUB 24/255. In no run: from noise" in text
    assert "| FGSM from 0 | 0 of 3 | **3 of 3 (epoch 3, 4, 5)** |" in text
    assert "| Fast-BAT | 0 of 3 | – | – | – |" in text
    row = r"^\| gradient alignment \| below 0.1 \| 1.00 ± 0.00 \| 1.00 \| 15 of 15 \(100 %\) \| 0 of \d+ \(0 %\) "
    assert re.search(row, text, re.M)
    (seeds, compositions) = re.findall(r"these warn \(.*\): \*\*(.*)\*\*\.", text)
    for names in (set(seeds.split("; ")), set(compositions.split("; "))):
        assert {"gradient alignment"} <= names <= {"gradient alignment", "change of gradient alignment"}
    assert "too few" not in text and "need not warn" not in text and "`a command`" in text
    with Image.open(tmp_path / "overfitting.png") as figure:
        figure.load()
        assert min(figure.size) > 700


def test_the_page_says_where_nothing_warns_or_too_little_collapses(runs, tmp_path):
    page = script("overfitting_page")
    cases = {
        "warn (at least 80 % of the collapses caught, alarms in at most 10 % of other epochs): **nothing that is "
        "measured**.": collapsing(runs, warned=False),
        "**Only 3 of 6 runs collapse, too few": [
            record(runs, m, 24, s, c) for m, c in (("fgsm", 3), ("fastat", None)) for s in range(3)
        ],
        "**All collapses are of one seed": [
            record(runs, m, e, 0, 3) for m in list(runs.COMPOSITIONS)[:5] for e in (16, 24)
        ],
        "**All collapses are of FGSM from 0: what warns of them need not warn of others.**": [
            record(runs, "fgsm", e, s, 3 + s) for e in (8, 12, 16, 24) for s in range(3)
        ],
        "**No run collapses": [record(runs, "fgsm", 8, 0)],
    }
    for words, records in cases.items():
        page.write_page(records, tmp_path, "a command")
        text = (tmp_path / "overfitting.md").read_text()
        assert words in text and ("these warn" in text) == ("warn (" in words or "need not" in words)
    failed = record(runs, "fgsm", 8, 0) | {"failed": "the loss is nan", "epochs": []}
    page.write_page([failed], tmp_path, "a command")
    assert "| FGSM from 0 | 0 of 1; 1 diverged |" in (tmp_path / "overfitting.md").read_text()


def test_every_composition_is_a_problem(runs):
    for name, composition in runs.COMPOSITIONS.items():
        problem = composition.problem(16 / 255, "train")
        assert problem.threat.radius == pytest.approx(16 / 255), name
        assert problem.lower.mode == "train"
    assert runs.COMPOSITIONS["fastat"].words == "--anchor uniform --step 1.25ε"
    assert runs.COMPOSITIONS["fastat"].problem(0.1, "eval").lower.step.value == pytest.approx(0.125)
    script("overfitting")
    for mistake, message in (
        (["--methods", "fast"], "--methods fast is not known; choose from fgsm"),
        (["--epsilons", "8"], "--epsilons has 8, and images are in"),
        (["--epsilons", "0"], "--epsilons is 0"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--page-only"], "has no run of 15 epochs on 10000 images"),
    ):
        with pytest.raises(ba.InputError, match=message):
            script("overfitting").command(mistake)


def test_what_could_warn_is_measured_without_a_trace(runs):
    """The network, its statistics and torch's generator are as before, and the same look gives the same numbers."""
    run = runs.Run("atas", 16, 0, 7, 60)
    trainer = runs.trainer_of(run, "data")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (runs.look(run, trainer.model, trainer.held_out, 6) for _ in range(2))
    assert one == two and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert 0 <= one["free"] <= 1 and -1 <= one["cosine"] <= 1 and one["share"] > 0 and one["gradient"] > 0
    # Free coordinates and the cosine are those of Fast-BAT's problem, whatever trains.
    other = runs.look(runs.Run("fgsm", 16, 0, 7, 60), trainer.model, trainer.held_out, 6)
    assert {name: one[name] == other[name] for name in ("free", "share", "cosine")} == dict.fromkeys(
        ("free", "share", "cosine"), True
    )


@pytest.mark.slow
def test_overfitting_goes_on_where_it_was_cut_off(runs, monkeypatch, tmp_path):
    flags = ["--methods", "fgsm", "atas", "--epsilons", "16/255", "--seeds", "1", "--epochs", "3", "--examples", "60"]
    command = [sys.executable, str(FOLDER / "overfitting.py"), *flags, "--jobs", "1", "--folder", "runs"]
    subprocess.run([*command, "--write", "docs"], check=True, capture_output=True)
    whole = {r["key"]: r for r in map(json.loads, Path("docs/overfitting.jsonl").read_text().splitlines())}
    assert whole.keys() == {"fgsm-eps16-seed0", "atas-eps16-seed0"} and not list(Path("runs").glob("*.pt"))
    text, figure = Path("docs/overfitting.md").read_text(), Path("docs/overfitting.png").read_bytes()
    assert "| FGSM from 0 | 0 of 1 |" in text and figure[:4] == b"\x89PNG"
    lines = whole["atas-eps16-seed0"]["epochs"]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    names = ("free", "share", "cosine", "gradient", "attacked", "alignment", "robust")
    assert all(math.isfinite(line[name]) for line in lines for name in names)

    # Killed after its second epoch, ATAS with what it remembers ends as it did.
    class Killed(Exception):
        pass

    look = runs.look

    def cut_off(run, model, held_out, epoch):
        if epoch == 2:
            raise Killed
        return look(run, model, held_out, epoch)

    run = runs.Run("atas", 16.0, 0, 3, 60)
    monkeypatch.setattr(runs, "look", cut_off)
    with pytest.raises(Killed):
        runs.perform(run, "data", tmp_path)
    monkeypatch.setattr(runs, "look", look)
    trained, epochs = [], runs.Trainer.train_epoch
    monkeypatch.setattr(runs.Trainer, "train_epoch", lambda self, n: trained.append(n) or epochs(self, n))
    again = runs.perform(run, "data", tmp_path)
    assert trained == [2]
    times = ("seconds", "train_seconds")
    assert [{k: v for k, v in line.items() if k not in times} for line in again["epochs"]] == [
        {k: v for k, v in line.items() if k not in times} for line in lines
    ]

    # Neither the page alone nor the whole command trains again.
    Path("docs/overfitting.md").unlink()
    done = subprocess.run([*command, "--write", "docs", "--page-only"], check=True, capture_output=True, text=True)
    assert Path("docs/overfitting.md").read_text() == text and "done:" in done.stdout
    before = Path("docs/overfitting.jsonl").read_bytes()
    subprocess.run([*command, "--write", "docs"], check=True, capture_output=True)
    assert Path("docs/overfitting.jsonl").read_bytes() == before
