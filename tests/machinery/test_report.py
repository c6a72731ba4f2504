"""The report's numbers, recomputed, and the sentences that go with them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from reporting import entry, epochs, made, make, row

from bilevel_at.report.groups import group
from bilevel_at.report.numbers import Spread, gap, radius
from bilevel_at.runs.record import attack_and_radius, read_all

pytestmark = pytest.mark.usefixtures("elsewhere")


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


def test_unfinished_runs_are_said_to_be():
    text = made(make("r", metrics=epochs()[:2], results={}))
    assert "2 of 3 epochs are done" in text.said and "no evaluation is on record" in text.said


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
