"""The long benchmark scripts stop when their minutes are up, or are killed, and the same command goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from benchmarking import FOLDER, script

import bilevel_at as ba
from bilevel_at import run as main_job
from bilevel_at.commands.plan import understand
from bilevel_at.commands.prepare import network_for, try_a_step
from bilevel_at.data import load_data
from bilevel_at.runs import evaluations
from bilevel_at.solver import Solver
from bilevel_at.train import Trainer

pytestmark = pytest.mark.usefixtures("small_cifar10")
EPOCH = ["--model", "one_layer_cnn", "--examples", "30", "--batch-size", "12", "--device", "cpu", "--write", "results"]
CIFAR = ["--methods", "fastat", "--epsilons", "8/255", "--epochs", "2", "--model", "one_layer_cnn"]
CIFAR += ["--test-examples", "6", "--autoattack", "4", "--device", "cpu", "--folder", "runs"]
SPEED = ["--model", "one_layer_cnn", "--epochs", "2", "--held-out", "10", "--test-examples", "6", "--batch-size", "20"]
SPEED += ["--device", "cpu", "--folder", "runs"]
EASY = ["--model", "small_cnn", "--batch-size", "5"]


@pytest.fixture
def easy(small_cifar10):
    """Classes of one colour each: some images stand under every attack after two epochs."""
    labels = np.arange(60) % 5
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]], dtype=np.uint8)
    x = np.broadcast_to(colours[labels][:, None, None], (60, 8, 8, 3))
    np.savez("data/cifar10.npz", x_train=x, y_train=labels, x_test=x[:12], y_test=labels[:12])


def read(pattern):
    return {path.name: json.loads(path.read_text()) for path in Path().glob(pattern)}


def test_time_is_up_once_the_minutes_are(capsys):
    in_pieces = script("pieces").in_pieces
    before = signal.getsignal(signal.SIGALRM)
    assert in_pieces(lambda: None, None) == in_pieces(lambda: None, 1.0) == 0
    assert in_pieces(lambda: time.sleep(30), 0.002) == 3
    assert capsys.readouterr().out == "not done: give the same command again\n"
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)

    def interrupted():
        raise KeyboardInterrupt("2 of 3")

    with pytest.raises(KeyboardInterrupt, match="2 of 3"):  # by the user
        in_pieces(interrupted, 1.0)
    for minutes in (0, -1, float("nan")):
        with pytest.raises(ba.InputError, match="--minutes is"):
            in_pieces(lambda: None, minutes)


def test_an_interruption_that_was_swallowed_comes_again(monkeypatch):
    pieces, swallowed = script("pieces"), []
    monkeypatch.setattr(pieces, "ONCE_MORE", 0.05)

    def work():
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            swallowed.append(True)
        time.sleep(30)

    assert pieces.in_pieces(work, 0.002) == 3 and swallowed == [True]


@pytest.mark.slow
def test_epoch_goes_on_and_times_standard_training_again(monkeypatch, capsys):
    epoch = script("epoch")
    flags = [*EPOCH, "--variants", "float32", "float32-compiled"]
    uncompiled = Solver.compile
    monkeypatch.setattr(Solver, "compile", lambda self: uncompiled(self, "eager"))
    seconds = iter(range(1, 100))
    honest = epoch.epoch_of

    def counted(*args):
        return honest(*args) | {"seconds": float(next(seconds))}

    monkeypatch.setattr(epoch, "epoch_of", counted)
    assert epoch.command([*flags, "--methods", "nfgsm", "beta", "--memory-formats", "contiguous"]) == 0
    (first,) = read("results/*.json").values()
    rows = [(r["variant"], r["method"], r.get("seconds"), r.get("standard_seconds")) for r in first["rows"]]
    assert rows == [
        ("float32", "standard", 1, 1),
        ("float32", "nfgsm", 2, 1),
        ("float32", "beta", 3, 1),
        ("float32-compiled", "standard", 4, 4),
        ("float32-compiled", "nfgsm", 5, 4),
        ("float32-compiled", "beta", None, None),
    ]
    assert "no single graph of this can be compiled" in first["rows"][-1]["refused"]
    assert all(r["warm_up_seconds"] > 0 and r["graphs"] == 0 for r in first["rows"] if "seconds" in r)
    assert "skipped: no single graph" in capsys.readouterr().out

    epoch.command([*flags, "--methods", "nfgsm", "fastat", "--memory-formats", "contiguous"])
    (second,) = read("results/*.json").values()
    assert second["rows"][:6] == first["rows"]
    added = [(r["method"], r["seconds"], r["standard_seconds"], r["ratio"]) for r in second["rows"][6:]]
    assert added == [("fastat", 7, 6, 7 / 6), ("fastat", 9, 8, 9 / 8)]
    epoch.command([*flags, "--methods", "nfgsm", "fastat", "--memory-formats", "contiguous"])
    assert next(seconds) == 10 and read("results/*.json")
    with pytest.raises(ba.InputError, match="problem file fast does not exist"):
        epoch.command([*flags, "--methods", "fast"])
    with pytest.raises(ba.InputError, match="--minutes needs --write"):
        epoch.command(["--minutes", "1"])


@pytest.mark.slow
def test_epoch_compiles_in_bfloat16_before_it_times():
    flags = [*EPOCH, "--variants", "bfloat16-compiled", "--memory-formats", "channels_last", "--methods", "fastat"]
    assert script("epoch").command(flags) == 0
    ((standard, fastat),) = (record["rows"] for record in read("results/*.json").values())
    for row in (standard, fastat):
        assert row["graphs"] == 0 and row["warm_up_seconds"] > row["seconds"]  # the last batch's size included


KILLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import {script}
from bilevel_at.runs import evaluations
from bilevel_at.train import Trainer
train_epoch, attack_examples = Trainer.train_epoch, evaluations.attack_examples

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def epoch(self, number):
    return die() if {where!r} == "training" and number == 1 else train_epoch(self, number)

def attacked(model, images, attack, **more):
    for number, state in enumerate(attack_examples(model, images, attack, **more)):
        yield state
        if attack.name == {where!r} and number == 1:
            die()

Trainer.train_epoch, evaluations.attack_examples, evaluations.SAVE_EVERY = epoch, attacked, 0.0
{script}.command(sys.argv[1:])
"""


def killed(name, where, flags):
    """The script in a process that kills itself in the second epoch, or after the second batch of an attack."""
    code = KILLED.format(folder=str(FOLDER), script=name, where=where)
    process = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


def followed(monkeypatch):
    """The numbers of epochs that are trained, and where each attack begins."""
    trained, begun = [], []
    train_epoch, attack_examples = Trainer.train_epoch, evaluations.attack_examples

    def epoch(self, number):
        trained.append(number)
        return train_epoch(self, number)

    def attacked(model, images, attack, *, trace, **more):
        begun.append((attack.name, trace.stage))
        return attack_examples(model, images, attack, trace=trace, **more)

    monkeypatch.setattr(Trainer, "train_epoch", epoch)
    monkeypatch.setattr(evaluations, "attack_examples", attacked)
    return trained, begun


def accuracies(record):
    return {name: (entry["accuracy"], entry["n"]) for name, entry in record["results"]["last"].items()}


@pytest.mark.slow
@pytest.mark.usefixtures("easy")
def test_cifar10_goes_on_after_kills_in_training_and_in_autoattack(monkeypatch):
    cifar10 = script("cifar10")
    flags = [*CIFAR[:-2], *EASY, *CIFAR[-2:]]
    assert cifar10.command([*flags[:-1], "unbroken"]) == 0
    killed("cifar10", "training", flags)
    assert len(ba.train.RunDir("runs/fastat-eps8-seed0").metrics()) == 1
    killed("cifar10", "autoattack", flags)
    assert not read("runs/*.json")
    trained, begun = followed(monkeypatch)
    assert cifar10.command([*flags, "--minutes", "10"]) == 0
    assert trained == [] and [name for name, _ in begun] == ["autoattack"] and begun[0][1] > 0
    (whole,), (broken,) = (read(f"{folder}/*.json").values() for folder in ("unbroken", "runs"))
    assert accuracies(whole) == accuracies(broken) and broken["results"]["last"]["autoattack"]["n"] == 4
    assert broken["results"]["last"]["autoattack"]["accuracy"] > 0.5
    monkeypatch.setattr(main_job, "run", None)
    assert cifar10.command(flags) == 0  # nothing is left to do
    Path("runs/cifar10.md").unlink()
    assert cifar10.command(flags) == 0 and "| fastat | 8/255 | 0 |" in Path("runs/cifar10.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("easy")
def test_speedrun_goes_on_after_kills_and_writes_its_page(monkeypatch):
    speedrun = script("speedrun")
    flags = ["--compositions", "nfgsm-15", "--no-compile", "--targets", "0", "100", *SPEED[:-2], *EASY, *SPEED[-2:]]
    unbroken = [*flags[:-1], "unbroken"]
    assert speedrun.command(unbroken) == 0
    for where in ("training", "nearest-40-3-2", "autoattack"):
        killed("speedrun", where, flags)
    trained, begun = followed(monkeypatch)
    assert speedrun.command(flags) == 0
    assert trained == [] and [name for name, _ in begun] == ["autoattack"] and begun[0][1] > 0
    (whole,), (broken,) = (read(f"{folder}/speedrun-*.json").values() for folder in ("unbroken", "runs"))
    assert (whole["pieces"], broken["pieces"]) == (1, 2)
    for name in ("clean", "nearest-40-3-2", "autoattack"):
        results = [{**record["results"][name], "seconds": 0} for record in (whole, broken)]
        assert results[0] == results[1] and results[0]["n"] == 6 and results[0]["accuracy"] > 0.5
    assert broken["seconds"] == sum(broken["epoch_seconds"]) > 0 and len(broken["epoch_seconds"]) == 2
    page = Path("runs/speedrun-gpu.md").read_text()
    assert "no figure here is a result" in page and "in 2 pieces" in page and " CPU, small_cnn" in page
    assert re.search(r"^\| 0 % \| nfgsm-15 \| [\d.]+ \| [\d.e-]+ \| [\d.]+ \(n = 6\) \| 1 \|$", page, re.M)
    assert "| 100 % | none | – |" in page


@pytest.mark.slow
def test_speedrun_stops_when_its_minutes_are_up(monkeypatch):
    speedrun = script("speedrun")
    train_epoch = Trainer.train_epoch
    monkeypatch.setattr(Trainer, "train_epoch", lambda self, n: time.sleep(n * 30) or train_epoch(self, n))
    flags = ["--compositions", "nfgsm-15", "--no-compile", "--targets", "100", *SPEED]
    assert speedrun.command([*flags, "--minutes", "0.08"]) == 3
    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    assert len(ba.train.RunDir("runs/nfgsm-15-seed0").metrics()) == 1 and not read("runs/*.json")
    assert speedrun.command([*flags, "--minutes", "10"]) == 0
    assert "autoattack" not in next(iter(read("runs/*.json").values()))["results"]  # it cannot reach 100 %


@pytest.mark.slow
def test_speedrun_records_what_failed_and_takes_one_s_own():
    speedrun = script("speedrun")
    flags = ["--no-compile", "--targets", "100", "--seeds", "2", *SPEED]
    own = ["problems/fastbat.py --lr 1e30", "problems/minmax.py --steps 1 --precision float32"]
    assert speedrun.command([*flags, "--composition", *own]) == 0
    records = read("runs/speedrun-*.json")
    assert len(records) == 4 and sum("the loss is" in r.get("failed", "") for r in records.values()) == 2
    assert {r["precision"] for r in records.values() if "failed" not in r} == {"float32"}
    page = Path("runs/speedrun-gpu.md").read_text()
    assert re.search(r"failed: \w+: the loss is", page)
    assert re.search(r"steps 1 --precision float32` \| [\d.]+ ± [\d.]+ \|", page)
    assert speedrun.command([*flags, "--composition", *own]) == 0 and read("runs/speedrun-*.json") == records
    (failed,) = (r for r in records.values() if "failed" in r and r["seed"] == 0)
    with pytest.raises(ba.InputError, match="holds a run of another command; choose another --folder"):
        speedrun.command([*flags, "--composition", *own, "--held-out", "12"])


@pytest.mark.slow
def test_speedrun_takes_no_mean_over_seeds_of_different_training():
    """One seed in bfloat16 below the target, and one on record from before, in float32, above it."""

    def record(seed, precision, accuracy, seconds):
        results = {name: {"accuracy": accuracy, "n": 10_000} for name in ("clean", "nearest-40-3-2", "autoattack")}
        job = ["problems/a.py", "--precision", precision, "--seed", str(seed), "--out", f"runs/a-seed{seed}"]
        about = {"device": "G", "model": "m", "proof": False, "date": "", "versions": {"torch": "2"}, "pieces": 1}
        about |= {"precision": precision, "compiled": True, "memory_format": "contiguous", "operations": None}
        about |= {"seconds": seconds, "start_seconds": 0.0, "epoch_seconds": [seconds], "results": results}
        return {"composition": "a", "text": "problems/a.py", "seed": seed, "job": job, **about}

    speedrun_page = script("speedrun_page")
    fast, slow, again = (
        record(*of) for of in ((0, "bfloat16", 0.4, 10), (1, "float32", 0.52, 300), (2, "float32", 0.54, 310))
    )
    text = speedrun_page.page([fast, slow, again], [45])
    assert "| 45 % | a | 305.0 ± 7.1 | – | 53.00 ± 1.41 | 2 |" in text
    assert "| a: `problems/a.py` | 10.0 |" in text


def test_speedrun_compiles_in_bfloat16():
    flags = ["--compositions", "fastbat-20", "--targets", "100", *SPEED]
    assert script("speedrun").command([*flags, "--epochs", "3"]) == 0
    (record,) = read("runs/speedrun-*.json").values()
    assert record["compiled"] and record["precision"] == "bfloat16" and record["memory_format"] == "contiguous"
    assert record["start_seconds"] > record["seconds"] / 2 and record["operations"] > 0


def test_autoattack_goes_to_what_may_reach_a_target_fastest_first(monkeypatch, tmp_path):
    script("speedrun")
    runs = sys.modules["speedrun_runs"]
    #         seconds, nearest, AutoAttack
    known = {"a": (9, 0.49, 0.46), "b": (5, 0.44, 0.439), "c": (7, 0.447, 0.449), "d": (8, 0.46, 0.455)}
    known["e"] = (20, 0.52, 0.51)
    entries = [
        runs.Entry(name, seed, "", [name, "--seed", str(seed)], tmp_path / name, f"speedrun-{name}-{seed}.json")
        for name in known
        for seed in range(2)
    ]
    asked = []

    def attacked(entry, attack, test):
        assert attack == "autoattack"
        asked.append((entry.name, entry.seed))
        return {"accuracy": known[entry.name][2], "n": 10_000}

    monkeypatch.setattr(runs, "attacked", attacked)
    speedrun = runs.Speedrun(entries, tmp_path, None, {}, (45.0, 60.0))
    about = {"device": "a GPU", "model": "m", "proof": False, "text": "t", "precision": "p", "compiled": True}
    about |= {"memory_format": "f", "pieces": 1, "epoch_seconds": [1], "versions": {"torch": "2"}, "date": "d"}
    for entry in entries:
        seconds, nearest, _ = known[entry.name]
        results = {"clean": {"accuracy": 0.8, "n": 10_000}, "nearest-40-3-2": {"accuracy": nearest, "n": 10_000}}
        own = {"composition": entry.name, "seed": entry.seed, "job": entry.job, "seconds": seconds, "results": results}
        speedrun.keep(entry, {**about, **own, "start_seconds": 0.5, "operations": 2e15})
    speedrun.work(margin=0.5)
    assert asked == [("c", 0), ("c", 1), ("d", 0), ("d", 1)]  # b is too weak, a and e are slower than d
    page = Path(tmp_path, "speedrun-gpu.md").read_text()
    assert "| 45 % | d | 8.0 ± 0.0 | 2 ± 0 | 45.50 ± 0.00 | 2 |" in page and "| 60 % | none |" in page
    assert "no figure here is a result" not in page and page.count("| 2 | 1 epochs") == 5


def plans(model):
    speedrun = script("speedrun")
    for text in speedrun.COMPOSITIONS.values():
        file, *own = text.split()
        yield understand([file, "--data", "cifar10", "--model", model, "--compile", "--precision", "bfloat16", *own])


def test_every_composition_is_a_command():
    for plan in plans("preact_resnet18"):
        options = plan.options
        assert options.model == "preact_resnet18" and options.data == "cifar10" and options.epochs <= 60
        assert options.precision == "bfloat16" and plan.threat.radius == pytest.approx(8 / 255)
    for mistake, message in (
        (["--compositions", "fast"], "--compositions fast is not known; choose from fastbat-20"),
        (["--composition", "problems/fastat.py --epoch 3"], "did you mean --epochs"),
        (["--seeds", "0"], "--seeds is 0"),
    ):
        with pytest.raises(ba.InputError, match=message):
            script("speedrun").command(mistake)


@pytest.mark.slow
def test_every_composition_can_be_compiled():
    train, _ = load_data("cifar10", "data")
    for plan in plans("small_cnn"):
        try_a_step(plan, network_for(plan, train), train)
