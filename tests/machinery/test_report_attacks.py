"""The report's tables of attacks: the worst case of all, radii, and what cannot be put together."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from reporting import entry, made, make, row

from bilevel_at.report.groups import group
from bilevel_at.report.radii import by_radius
from bilevel_at.report.union import worst_case
from bilevel_at.runs.record import read, read_all

pytestmark = pytest.mark.usefixtures("elsewhere")


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
