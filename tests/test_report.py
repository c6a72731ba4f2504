"""The report: what it reads, how it groups and counts, and the page in a browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands.report import command as main
from bilevel_at.report import report
from bilevel_at.report.groups import group
from bilevel_at.report.numbers import Spread, gap, radius
from bilevel_at.report.page import Cell, Figure, Section, Table, page
from bilevel_at.report.radii import by_radius
from bilevel_at.report.union import worst_case
from bilevel_at.runs.record import attack_and_radius, read, read_all

NASTY = "<script>alert('x')</script> & \"q\" $x^2$"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def entry(accuracy, epsilon=0.2, n=100, **more):
    return {"accuracy": accuracy, "n": n, "epsilon": epsilon, "seconds": 0.1, "data": "d" * 16, **more}


def epochs(robust=(0.2, 0.5, 0.4), seconds=1.0, **more):
    return [
        {
            "epoch": i,
            "loss": 2.0 / i,
            "train": 0.1 * i,
            "clean": 0.5 + 0.1 * i,
            "robust": value,
            "attack": "pgd-20-1",
            "implicit_ratio": 0.0,
            "perturbation": 0.2,
            "lr": 0.1 / i,
            "seconds": seconds + 1,
            "train_seconds": seconds * i,
            **more,
        }
        for i, value in enumerate(robust, 1)
    ]


def make(path, *, file="problems/fastat.py", seed=0, results=None, metrics=None, options=None, **config):
    """A run directory as bilevel_at.run leaves it, with the parts a test is about."""
    path = Path(path)
    path.mkdir(parents=True)
    written = {
        "command": ["bilevel_at.run", file, "--seed", str(seed)],
        "file": file,
        "file_sha256": "ab" * 32,
        "problem": {"epsilon": 0.2},
        "solver": {"name": "ZeroIG"},
        "options": {"epochs": 3, "data": "digits", "device": "auto", "seed": seed, **(options or {})},
        "model": "small_cnn",
        "parameters": 1234,
        "versions": {"torch": "2.9"},
        "date": "2026-01-02",
        "machine": {"platform": "Linux", "threads": 1, "device": "A CPU"},
        **config,
    }
    (path / "config.json").write_text(json.dumps(written))
    lines = epochs() if metrics is None else metrics
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if results is None:
        results = {w: {"clean": entry(0.9, 0.0), "pgd-50-10": entry(0.5)} for w in ("best", "last")}
    (path / "results.json").write_text(json.dumps(results))
    return path


class Text(HTMLParser):
    """Rows of tables, paragraphs and captions; and whether every tag that is opened is closed in order."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, source):
        super().__init__()
        self.open, self.rows, self.images, self.said = [], [], [], ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag in self.VOID:
            self.images += [dict(attributes)] if tag == "img" else []
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.said += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def made(*runs, out="out"):
    return Text(report(runs, out).read_text(encoding="utf-8"))


def row(text, first):
    return next(cells for cells in text.rows if cells and cells[0].startswith(first))


def complaint(*args):
    with pytest.raises(ba.InputError) as error:
        main([str(a) for a in args])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


# --- numbers and groups ---------------------------------------------------------------------------------------------


def test_table_is_mean_and_standard_deviation_over_seeds():
    accuracies = {"fastat": [0.5, 0.53, 0.41], "fastbat": [0.61, 0.6, 0.66]}
    paths = []
    for name, values in accuracies.items():
        for seed, value in enumerate(values):
            results = {"best": {"clean": entry(0.9, 0.0), "fgsm": entry(value + 0.1), "pgd-50-10": entry(value)}}
            paths.append(make(f"{name}-{seed}", file=f"problems/{name}.py", seed=seed, results=results))
    text = made(*paths)
    assert text.rows[0] == ["training", "checkpoint (epoch)", "clean", "fgsm", "pgd-50-10"]
    for name, values in accuracies.items():
        expected = f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
        cells = row(text, name)
        assert cells[0] == f"{name} 3 seeds" and cells[1] == "best (2)"
        assert cells[-1].removeprefix("▲") == expected
    assert row(text, "fastbat")[-1].startswith("▲") and not row(text, "fastat")[-1].startswith("▲")
    assert f"{100 * np.mean(accuracies['fastbat']):.1f} ±" in text.said.split("Test accuracy")[0]


def test_single_seed_has_no_spread():
    text = made(make("one"))
    assert row(text, "fastat")[2:] == ["90.0", "50.0"]
    assert "±" not in " ".join(" ".join(cells) for cells in text.rows)


def test_groups_are_runs_that_differ_in_seed_device_and_folder_only():
    a = make("a", seed=0, options={"device": "cpu", "data_dir": "x"})
    b = make("b", seed=1, options={"device": "cuda", "attacks": ["clean"]})
    other_radius = make("c", seed=2, problem={"epsilon": 0.1})
    other_solver = make("d", seed=3, solver={"name": "FullKKT"})
    again = make("e", seed=0)
    other_file = make("f", seed=0, file="problems/atas.py", file_sha256="cd" * 32)
    groups = group(read_all([a, b, other_radius, other_solver, again, other_file]))
    assert [[run.name for run in g.runs] for g in groups] == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
    labels = [g.label for g in groups]
    assert len(set(labels)) == 5 and labels[4] == "atas" and "epsilon 0.1" in labels[1] and "FullKKT" in labels[2]


def test_numbers_as_the_field_writes_them():
    assert [radius(e) for e in (8 / 255, 0.2, 0.5, 2 / 255, 0.05)] == ["8/255", "0.2", "0.5", "2/255", "0.05"]
    assert str(Spread((0.5,))) == "50.0" and Spread((0.5,)).std is None
    assert gap(Spread((-0.02, -0.01))).startswith("−1.5 ± 0.7") and gap(Spread((1e-5,))) == "0.0"
    assert attack_and_radius("pgd-50-10@8/255") == ("pgd-50-10", 8 / 255)
    assert attack_and_radius("transfer:runs/me@home") == ("transfer:runs/me@home", None)


def test_gap_between_best_and_last_epoch():
    results = [
        {"best": {"pgd-50-10": entry(best)}, "last": {"pgd-50-10": entry(last)}}
        for best, last in ((0.6, 0.5), (0.7, 0.5))
    ]
    text = made(*[make(f"r{seed}", seed=seed, results=r) for seed, r in enumerate(results)])
    expected = f"{100 * statistics.mean([0.1, 0.2]):.1f} ± {100 * statistics.stdev([0.1, 0.2]):.1f}"
    assert f"+{expected} pgd-50-10" in [cells[2] for cells in text.rows if len(cells) > 2]
    assert f"robust accuracy falls in fastat, by {expected} points" in text.said


def test_gap_on_held_out_images_where_the_test_set_has_no_last():
    text = made(make("r", results={"best": {"pgd-50-10": entry(0.5)}}))
    assert "+10.0 pgd-20-1, held-out" in [cells[2] for cells in text.rows if len(cells) > 2]


def test_times_are_compared_on_one_machine_only():
    a = make("a", metrics=epochs(seconds=1.0))
    b = make("b", file="problems/fastbat.py", metrics=epochs(seconds=3.0))
    text = made(a, b)
    assert (
        "relative to fastat" in text.said and "3.00 ×" in text.said and "6.00 s" in text.said and "2.00 s" in text.said
    )
    assert "3.0 times one of fastat" in text.said and Path("out/figures/seconds.png").is_file()
    c = make("c", file="problems/atas.py", machine={"device": "A GPU"})
    text = made(a, c, out="other")
    assert "relative to" not in text.said and not Path("other/figures/seconds.png").exists()
    assert "A CPU" in text.said and "A GPU" in text.said and "different machines" in text.said


# --- attacks --------------------------------------------------------------------------------------------------------


def with_files(path, arrays, label=None, data="d" * 16, **config):
    """A run whose attacks have per-example results."""
    n = len(next(iter(arrays.values())))
    label = np.arange(n) % 10 if label is None else label
    entries = {}
    for name, correct in arrays.items():
        file = f"evaluation/best/{name}.npz"
        at = 0.0 if name == "clean" else 0.2
        entries[name] = entry(float(np.mean(correct)), at, n, norm="linf", file=file, data=data)
    make(path, results={"best": entries}, **config)
    (Path(path) / "evaluation" / "best").mkdir(parents=True)
    for name, correct in arrays.items():
        np.savez(Path(path) / entries[name]["file"], label=label, correct=np.asarray(correct, dtype=bool))
    return Path(path)


def test_worst_case_is_the_union_of_all_attacks():
    arrays = {"clean": [1, 1, 1, 1, 0], "pgd-50-10": [1, 1, 0, 1, 0], "square": [0, 1, 1, 1, 0]}
    run = with_files("r", arrays)
    found = worst_case(group([read(run)])[0], "best")
    assert found.spread.values == (2 / 5,) and set(found.attacks) == {"pgd-50-10", "square"} and found.n == 5
    text = made(run)
    assert text.rows[0][-1] == "worst case of all" and row(text, "fastat")[-1] == "40.0"
    assert "at most 20.0 points below the strongest" in text.said


def test_worst_case_takes_attacks_on_the_same_images_only():
    run = with_files("r", {"clean": [1, 1, 1], "pgd-50-10": [1, 1, 0], "square": [0, 1, 1]})
    results = json.loads((run / "results.json").read_text())
    results["best"]["square"]["data"] = "e" * 16
    (run / "results.json").write_text(json.dumps(results))
    assert worst_case(group([read(run)])[0], "best") is None
    other = with_files("other", {"pgd-50-10": [1, 1, 0], "square": [0, 1, 1]})
    np.savez(other / "evaluation/best/square.npz", label=np.array([5, 5, 5]), correct=np.array([False, True, True]))
    assert worst_case(group([read(other)])[0], "best") is None


def test_worst_case_leaves_no_run_directory(tmp_path):
    run = with_files("r", {"pgd-50-10": [1, 0], "square": [0, 1]})
    shutil.move(run / "evaluation/best/square.npz", tmp_path / "square.npz")
    results = json.loads((run / "results.json").read_text())
    results["best"]["square"]["file"] = "../square.npz"
    (run / "results.json").write_text(json.dumps(results))
    assert worst_case(group([read(run)])[0], "best") is None


def test_damaged_arrays_are_one_sentence_on_the_page():
    run = with_files("r", {"pgd-50-10": [1, 0], "square": [0, 1]})
    (run / "evaluation/best/square.npz").write_bytes(b"PK\x03\x04 not really")
    text = made(run)
    assert "Not shown:" in text.said and "square.npz" in text.said and "How to repeat" in text.said


def test_accuracy_by_radius():
    results = {
        "best": {
            "clean": entry(0.9, 0.0),
            "pgd-50-10": entry(0.5),
            "pgd-50-10@0.1": entry(0.7, 0.1),
            "pgd-50-10@0.4": entry(0.123, 0.4),
            "fgsm": entry(0.6),
        }
    }
    again = json.loads(json.dumps(results))
    again["best"]["pgd-50-10@0.4"]["accuracy"] = 0.323
    runs = [make("a", results=results), make("b", seed=1, results=again)]
    curves = by_radius(group(read_all(runs)))
    assert list(curves) == ["pgd-50-10"]
    assert curves["pgd-50-10"]["fastat"] == [(0.0, 0.9), (0.1, 0.7), (0.2, 0.5), (0.4, pytest.approx(0.223))]
    text = made(*runs)
    assert "fastat still has 22.3% at ε = 0.4" in text.said and "only larger radii" in text.said
    assert text.rows[0] == ["training", "checkpoint (epoch)", "clean", "fgsm", "pgd-50-10"]
    assert "Accuracy against ε" not in made(make("c"), out="no").said
    again["best"]["pgd-50-10@0.4"]["accuracy"] = 0.0
    assert "it keeps 0.0% at ε = 0.4" in made(make("d", results=again), out="zero").said


def test_rows_that_cannot_be_ranked_have_no_best():
    a = make("a")
    b = make("b", file="problems/b.py", problem={"epsilon": 0.1})
    c = make("c", file="problems/c.py", results={"best": {"pgd-50-10": entry(0.4, data="e" * 16)}})
    for other, why in ((b, "(ε = 0.1; ε = 0.2)"), (c, "different images")):
        text = made(a, other, out=f"out-{other.name}")
        assert "not to be ranked" in text.said and why in text.said
        assert not any("▲" in cell for cells in text.rows for cell in cells)


# --- warnings -------------------------------------------------------------------------------------------------------


def test_warnings_come_first_and_say_of_what():
    run = make("odd", metrics=epochs(robust=(0.4, 0.5, 0.02)))
    message = "Square beats PGD by 12 points <b>."
    checks = {
        "best": {"warnings": [{"name": "black-box", "message": message}], "measured": {"difference": 0.12}},
        "last": {"warnings": [], "measured": {"difference": 0.0}},
    }
    (run / "checks.json").write_text(json.dumps(checks))
    said = made(run).said
    assert said.index(message) < said.index("Test accuracy") and "Best checkpoint:" in said
    assert "catastrophic overfitting in epoch 3" in said and "difference" in said
    fine = make("fine")
    (fine / "checks.json").write_text(json.dumps({"best": {"warnings": [], "measured": {"pgd": 0.4}}}))
    said = made(fine, out="fine-out").said
    assert "Warnings: none" in said and "found nothing to warn of" in said
    assert "Not checked." in made(make("unchecked"), out="u").said
    (fine / "checks.json").write_text(json.dumps({"best": {"warnings": [], "measured": {}, "network": {}}}))
    said = made(fine, out="compared").said  # with --checks 0
    assert "Not checked." in said and "found nothing" not in said
    (fine / "checks.json").write_text(json.dumps({"best": {"warnings": [], "network": {"n": 100, "random": 0.0}}}))
    assert "The checks of best had no radius to attack in" in made(fine, out="half").said


def kept(run, name, correct, **identity):
    """A record of examples, as bilevel_at.evaluate writes it; the entry that it is of."""
    (run / "evaluation" / "best").mkdir(parents=True, exist_ok=True)
    settings = {"attack": name, "data": "d" * 16, "weights": "w", "seed": 0, "batch_size": 250}
    arrays = {"label": np.zeros(len(correct), np.int64), "correct": np.array(correct, dtype=bool)}
    finished = identity.pop("finished", True)
    said = json.dumps({**settings, **identity})
    np.savez(run / f"evaluation/best/{name}.npz", **arrays, finished=np.array(finished), identity=np.array(said))
    return {**entry(sum(correct) / len(correct), n=len(correct)), **settings, "file": f"evaluation/best/{name}.npz"}


@pytest.mark.parametrize("how", [{"finished": False}, {"seed": 1}, {"weights": "other"}])
def test_records_that_are_not_of_their_entry_are_not_put_together(how):
    run = make("r", results={})
    entries = {name: kept(run, name, [True, False, True, c]) for name, c in (("pgd-2-1", True), ("beta-2", False))}
    (run / "results.json").write_text(json.dumps({"best": entries}))
    assert "worst case of all" in made(run, out="whole").said
    kept(run, "beta-2", [False, False, False, False], **how)
    assert "worst case of all" not in made(run, out="partial").said


def test_another_norm_and_fewer_images_do_not_enter_the_row():
    """At the same radius, and on a few images of which there is a result on all."""
    best = {
        "clean": entry(0.9, epsilon=0.0),
        "pgd-2-1": entry(0.5, norm="linf"),
        "pgd-2-1-l2@0.2": entry(0.1, norm="l2"),
        "pgd-2-1[n=10]": entry(0.2, n=10, norm="linf"),
        "autoattack": entry(0.3, n=10, norm="linf"),
    }
    text = made(make("r", results={"best": best}, constraint={"norm": "linf", "epsilon": 0.2}))
    assert "l2" not in " ".join(text.rows[0]) and "n=10" not in " ".join(text.rows[0])
    assert "30.0 n = 10" in " ".join(" ".join(row(text, "fastat")).split())
    # what is on fewer images is shown, and is not what the sentence ranks; the error is that of the named accuracy
    error = 100 * math.sqrt(0.5 * 0.5 / 100)
    assert "keeps 50.0% under pgd-2-1, of 90.0% without an attack. One of 100 images is 1.0 points; " in text.said
    assert f"the sampling error of such an accuracy is about {error:.1f}." in text.said


def test_unfinished_runs_are_said_to_be():
    text = made(make("r", metrics=epochs()[:2], results={}))
    assert "2 of 3 epochs are done" in text.said and "no evaluation is on record" in text.said


# --- what may be missing, damaged or hostile ------------------------------------------------------------------------


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


def test_alignment_is_drawn_and_told_where_it_was_measured():
    metrics = epochs()
    for line, value in zip(metrics, (0.9, 0.37, 0.8), strict=True):
        line["alignment"] = value
    assert "at least 0.37 (epoch 2)" in made(make("a", metrics=metrics)).said
    assert "cosine" not in made(make("b"), out="b-out").said
    both = made("a", make("c", file="problems/c.py"), out="both").said
    assert "lowest gradient alignment of any epoch is 0.37, in fastat" in both


def test_captions_have_the_numbers_measured():
    text = made(make("a", metrics=epochs(robust=(0.2, 0.513, 0.4))))
    assert "the loss goes from 2 in epoch 1 to 0.667 in epoch 3" in text.said
    assert "highest in epoch 2 (51.3%), with 40.0% after the last, 3" in text.said
    assert all(image["alt"] for image in text.images) and text.images


def test_held_out_accuracies_under_different_attacks_are_not_ranked():
    a, b = make("a"), make("b", file="problems/b.py", metrics=epochs(attack="pgd-2-1"))
    assert "under different attacks" in made(a, b).said and "most robust on held-out" not in made(a, b).said
    c = make("c", file="problems/c.py", metrics=epochs(robust=(0.2, 0.5, 0.3)))
    assert "fastat is the most robust on held-out images (40.0% under pgd-20-1), c the least (30.0%)" in made(a, c).said


def test_what_files_say_is_escaped():
    bad = NASTY.replace("/", "")
    a = make(bad, file=f"{NASTY}.py", model=NASTY, command=["bilevel_at.run", NASTY, "\ud800\x1b[0m"])
    results = {
        "best": {"clean": entry(0.9, 0.0), NASTY: entry(0.5), "_hidden@0.4": entry(0.1, 0.4), "_hidden": entry(0.3)}
    }
    metrics = epochs(attack=NASTY)
    b = make(f"_{bad}", file=f"_{bad}.py", results=results, metrics=metrics, options={"data": NASTY})
    (b / "checks.json").write_text(json.dumps({NASTY: {"warnings": [{"name": NASTY, "message": NASTY}]}}))
    for runs, out in (([a, b], "two"), ([b], "one")):
        source = report(runs, out).read_text(encoding="utf-8")
        text = Text(source)
        assert "<script" not in source and NASTY in text.said and "\x1b" not in source
        assert html.escape(NASTY) in source


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
    assert "python -m bilevel_at.run problems/fastat.py --seed 1" in said
    assert "python -m bilevel_at.evaluate runs/a --attacks 'a b'" in said
    assert "python -m bilevel_at.report runs/a runs/b" in said and "ab" * 32 in said and "2.9" in said
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0 and "--out" in capsys.readouterr().out


def test_the_command_ends_with_2_for_a_mistake():
    done = subprocess.run([sys.executable, "-m", "bilevel_at.report", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("bilevel_at.report: there is no run")


def test_a_section_is_a_list_of_parts(tmp_path):
    from bilevel_at.figures.style import plt, save

    save(plt.figure(figsize=(2, 1)), tmp_path / "f.png")
    parts = [
        "words & more",
        Figure(tmp_path / "f.png", "caption"),
        Table(["a", "b"], [[Cell("x", rows=2), "1"], ["", "2"]]),
    ]
    text = Text(page("title", "lead", [("fact", "value")], [Section("One", parts)]))
    assert text.rows == [["a", "b"], ["x", "1"], ["2"]] and "words & more" in text.said
    assert text.images[0]["src"].startswith("data:image/png;base64,") and text.images[0]["alt"] == "caption"


# --- a real run, and a browser --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two trainings of an epoch or two, and one of a run whose names are hostile; one page of all, one of the first."""
    folder = tmp_path_factory.mktemp("real")
    short = ["--examples", "100", "--test-examples", "50", "--attacks", "clean", "pgd-2-1", "--select", "pgd-2-1"]
    for name, seed in (("fastat", 0), ("fastat", 1), ("fastbat", 0)):
        out = folder / f"{name}-{seed}"
        assert run_module.run([name, "--epochs", "2", "--seed", str(seed), "--out", str(out), *short]) == 0
    hostile = folder / "<img src=x onerror=alert(1)> & 'q'"
    results = {
        "best": {
            "clean": entry(0.9, 0.0),
            "averylongattackname-of-someone-10-20-30": entry(0.41),
            **{f"pgd-{k}-10": entry(0.5 - k / 1000) for k in (10, 20, 30, 40, 50)},
            **{f"pgd-50-10@{k}/255": entry(0.9 - k / 100, k / 255) for k in (8, 16, 24, 32, 64)},
        }
    }
    make(hostile, file=f"{'long' * 20}.py", results=results, metrics=epochs(alignment=0.9))
    runs = [*sorted(folder.glob("fast*")), hostile]
    return runs, report(runs), report(runs[:1])


def test_real_runs(real):
    runs, page, _ = real
    text = Text(page.read_text(encoding="utf-8"))
    accuracies = [json.loads((r / "results.json").read_text())["best"]["pgd-2-1"]["accuracy"] for r in runs[:2]]
    mean, std = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
    cells = row(text, "fastat 2 seeds")
    assert f"{mean:.1f} ± {std:.1f}" in [cell.removeprefix("▲") for cell in cells]
    assert math.isfinite(mean) and "examples-0.png" in {p.name for p in page.parent.glob("figures/*.png")}
    assert len(text.images) == len(list(page.parent.glob("figures/*.png")))


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    quiet = ["networking", "timer-throttling"]
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=[*arguments, *(f"--disable-background-{what}" for what in quiet)]
        )
        yield browser
        browser.close()


@pytest.mark.parametrize("which", [1, 2], ids=["several", "one"])
def test_page_in_a_browser(real, chromium, which):
    address = real[which].resolve().as_uri()
    for width in (1200, 390):
        for scheme in ("light", "dark"):
            tab = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            wrong, asked = [], []
            tab.on("console", lambda m, wrong=wrong: wrong.append(m.text) if m.type in ("error", "warning") else None)
            tab.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.goto(address)
            images = tab.eval_on_selector_all("img", "all => all.map(i => [i.complete, i.naturalWidth, i.alt])")
            assert images and all(complete and size > 0 and alt for complete, size, alt in images)
            size = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert size[0] <= size[1], f"the page is {size[0]} wide at {width}"
            assert wrong == []
            assert [url for url in asked if not url.startswith("data:")] == [address]
            tab.close()


def test_page_needs_nothing_else(real):
    source = real[1].read_text(encoding="utf-8")
    assert "<script" not in source and not re.search(r"""(?:src|href)=["'](?!data:|\#)""", source)
    assert 'lang="en"' in source and 'name="viewport"' in source and "<title>" in source
