"""Weights to share: .safetensors files, and the trained network that ships in the package."""

from __future__ import annotations

import fnmatch
import json
import os
import random
import re
import struct
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from attempting import CASES, attempt, conclude
from evaluating_runs import complaint, evaluate, read
from fuzzing import VALUES, damaged_bytes
from running import OWN, ROOT, SHORT, run

import bilevel_at as ba
from bilevel_at.commands import export as export_command
from bilevel_at.data import load_data
from bilevel_at.models import TRAINED
from bilevel_at.runs.shared import KEY, card, export, is_shared, load_shared, read_shared

NAME = "digits-fastbat"
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install safetensors")
here = pytest.mark.usefixtures("run_here")


def accuracies(model, attacks=("clean", "pgd-50-10"), epsilon=0.2):
    from bilevel_at.evaluate import evaluate

    return {n: s.accuracy for n, s in evaluate(model, load_data("digits")[1], attacks, epsilon, checks=0).items()}


def test_the_shipped_network_is_what_its_card_says(elsewhere):
    """On the digits' test split; other processors round otherwise, by an image or two."""
    about, model = ba.card(NAME), ba.load(NAME)
    assert (about["model"], about["data"], about["classes"], about["shape"]) == ("small_cnn", "digits", 10, [1, 8, 8])
    assert (about["file"], about["options"]["seed"], about["checkpoint"]) == ("fastbat.py", 0, "best")
    assert about["constraint"]["norm"] == "linf" and about["constraint"]["epsilon"] == 0.2
    assert not model.training and about["results"].keys() == {"clean", "fgsm", "pgd-50-10"}
    found = accuracies(model, tuple(about["results"]))
    for name, score in about["results"].items():
        assert score["n"] == 360 and abs(found[name] - score["accuracy"]) <= 3 / 360, name
    assert found["clean"] > 0.95 and 0.6 < found["pgd-50-10"] < found["fgsm"] < 0.9


def test_the_shipped_file_is_small_and_in_the_wheel():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pattern = re.search(r'"bilevel_at.models" = \["(.*?)"\]', project)[1]
    for path in TRAINED.values():
        assert path.stat().st_size < 320_000
        assert fnmatch.fnmatch(path.relative_to(ROOT / "bilevel_at" / "models").as_posix(), pattern)
        assert str(Path.home()).encode() not in path.read_bytes() and b"/work" not in path.read_bytes()


def test_the_shipped_network_s_problem_file_is_this_one():
    """Where it has changed, ``python benchmarks/shipped.py`` makes the network anew."""
    import hashlib

    assert ba.card(NAME)["file_sha256"] == hashlib.sha256((ROOT / "problems" / "fastbat.py").read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_script_makes_it_again(tmp_path, monkeypatch, drawn):
    """The same bits on this machine as before, or, on another, the same network within rounding."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import shipped

    path = shipped.make(tmp_path)
    again, ours = read_shared(path)[0], read_shared(NAME)[0]
    assert again.keys() == ours.keys()
    results = card(path)["results"]
    for name, score in ba.card(NAME)["results"].items():
        assert abs(results[name]["accuracy"] - score["accuracy"]) <= 0.05, name


def test_evaluation_of_the_shipped_network_needs_no_flags(elsewhere):
    evaluate(NAME, "--attacks", "clean", "fgsm", "--checks", 0)
    results = read(f"runs/{NAME}-evaluation/results.json")["model"]
    about = ba.card(NAME)["results"]
    for name in ("clean", "fgsm"):
        assert abs(results[name]["accuracy"] - about[name]["accuracy"]) <= 3 / 360
    assert results["fgsm"]["epsilon"] == 0.2
    evaluate(NAME, "--attacks", "fgsm", "--epsilon", "0.1", "--checks", 0, "--out", "mine", "--examples", 50)
    assert read("mine/results.json")["model"]["fgsm"]["epsilon"] == 0.1
    evaluate(NAME, "--attacks", f"transfer:{NAME}:fgsm", "--checks", 0, "--examples", 20)


def test_a_directory_of_that_name_is_a_run(elsewhere):
    Path(NAME).mkdir()
    assert not is_shared(NAME)
    with pytest.raises(ba.InputError, match="config.json"):
        ba.load(NAME)


@here
@pytest.mark.parametrize("which", ["best", "last"])
def test_export_and_back(which):
    path = ba.export("run", "mine.safetensors", which=which)
    model, run_model = ba.load(path), ba.load("run", which)
    x = load_data("digits")[1].x[:20]
    assert torch.equal(model(x), run_model(x))
    state = safetensors.load_file(path)  # a reader that knows nothing of this library
    assert all(torch.equal(state[name], value) for name, value in run_model.state_dict().items())
    about = card(path)
    assert about["checkpoint"] == which and about["versions"]["torch"] == torch.__version__
    assert about["normalisation"]["mean"] == run_model.mean.flatten().tolist()
    config = read("run/config.json")
    assert all(about[name] == config[name] for name in ("problem", "solver", "lower", "constraint", "model", "shape"))


@here
def test_results_go_with_the_weights_they_are_of():
    evaluate("run", "--attacks", "clean", "fgsm", "--which", "last", "--checks", 0, "--examples", 60)
    stored = read("run/results.json")["last"]
    results = card(ba.export("run", "a.safetensors", which="last"))["results"]
    assert results["fgsm"] == {key: stored["fgsm"][key] for key in ("accuracy", "n", "epsilon", "norm")}
    assert card(ba.export("run", "b.safetensors", which="last", half=True))["results"] == {}
    assert Path("b.safetensors").stat().st_size < 0.6 * Path("a.safetensors").stat().st_size
    assert all(p.dtype == torch.float32 for p in ba.load("b.safetensors").parameters())


@here
def test_the_command(capsys):
    assert export_command.command(["run", "out.safetensors", "--which", "last"]) == 0
    assert "out.safetensors: small_cnn of fastat.py, last epoch" in capsys.readouterr().out
    for args, why in (
        (["run"], "a run and a file are needed"),
        (["run", "x.pt"], "does not end in .safetensors"),
        (["nowhere", "x.safetensors"], "config.json"),
        (["run", "x.safetensors", "--which", "first"], "first"),
        (["run", "weights.pt/x.safetensors"], "cannot be written"),
    ):
        with pytest.raises(ba.InputError, match=re.escape(why)):
            export_command.command(args)
    assert not Path("x.safetensors").exists()


@here
def test_evaluate_takes_the_file_with_and_without_flags():
    ba.export("run", "mine.safetensors", which="last")
    evaluate("run", "--attacks", "pgd-5-1", "--which", "last", "--checks", 0)
    expected = read("run/results.json")["last"]["pgd-5-1"]["accuracy"]
    evaluate("mine.safetensors", "--attacks", "pgd-5-1", "--checks", 0)
    assert read("mine-evaluation/results.json")["model"]["pgd-5-1"]["accuracy"] == expected
    # One of another library says nothing of the network: the flags do.
    safetensors.save_file(torch.load("weights.pt", weights_only=True), "plain.safetensors")
    assert "--model" in complaint("plain.safetensors", "--attacks", "clean", "--checks", 0)
    flags = ["--model", "small_cnn", "--epsilon", 0.2, "--attacks", "pgd-5-1", "--checks", 0]
    evaluate("plain.safetensors", *flags)
    assert read("plain-evaluation/results.json")["model"]["pgd-5-1"]["accuracy"] == expected
    assert "does not fit the model" in complaint("plain.safetensors", "--model", "one_layer_cnn", *flags[2:])


@pytest.mark.usefixtures("elsewhere")
def test_a_network_of_a_problem_file():
    Path("own.py").write_text(OWN.format(width=10))
    run("own.py", *SHORT, "--out", "run")
    path = ba.export("run", "own.safetensors")
    with pytest.raises(ba.InputError, match="pass one as load"):
        ba.load(path)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    assert torch.equal(
        ba.load(path, model=net)[1].weight, torch.load("run/best.pt", weights_only=True)["model"]["1.weight"]
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing.safetensors", "does not exist"),
        (NAME + "x", "there is no run|not a run|config.json"),
        (NAME, "is for runs"),
    ],
)
def test_mistakes_are_one_line(elsewhere, name, why):
    with pytest.raises(ba.InputError, match=why) as error:
        ba.load(name, "last" if name == NAME else "best")
    assert "\n" not in str(error.value)


def rewritten(content, change):
    """The file with another header."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def hostile(content, r):
    """A file as a stranger, or a disk, may have left it; and how."""
    how = r.choice(["bytes", "bytes", "length", "about", "about", "tensor", "metadata"])
    if how == "bytes":
        return damaged_bytes(content, r), how
    if how == "length":
        return struct.pack("<Q", r.choice([0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1])) + content[8:], how

    def change(header):
        names = [name for name in header if name != "__metadata__"]
        if how == "tensor":
            header[r.choice(names)][r.choice(["dtype", "shape", "data_offsets"])] = r.choice(
                [*VALUES, [0, 2**62], [2**31, 2**31], "F64", "BOOL", [1, -1]]
            )
        elif how == "metadata":
            header["__metadata__"] = r.choice(VALUES)
        else:
            about = json.loads(header["__metadata__"][KEY])
            about[r.choice(list(about))] = r.choice([*VALUES, [1, 10**6, 10**6], [10**9, 8, 8], 10**8])
            header["__metadata__"][KEY] = r.choice([json.dumps(about)] * 5 + ["", "[1]", "{", "null", "x" * 5_000])

    return rewritten(content, change), how


@pytest.mark.usefixtures("elsewhere", "bounded")
def test_files_of_strangers_are_read_or_refused():
    """``BILEVEL_FUZZ=50000`` draws more cases."""
    content = TRAINED[NAME].read_bytes()
    failures, tally = [], Counter()
    for seed in range(CASES // 2):
        r = random.Random(seed)
        Path("x.safetensors").unlink(missing_ok=True)
        damaged, how = hostile(content, r)
        Path("x.safetensors").write_bytes(damaged)
        failures += filter(None, [attempt(seed, how, partial(load_shared, "x.safetensors"), tally, "x.safetensors")])
    conclude(failures, tally)
    assert tally["read"] and tally["refused"]


@pytest.mark.usefixtures("elsewhere")
def test_a_file_that_says_it_is_large_takes_no_memory():
    content = TRAINED[NAME].read_bytes()

    def change(header):
        about = json.loads(header["__metadata__"][KEY])
        about["shape"], about["classes"] = [3, 40_000, 40_000], 10
        header["__metadata__"][KEY] = json.dumps(about)

    Path("x.safetensors").write_bytes(rewritten(content, change))
    with pytest.raises(ba.InputError, match="does not have the weights of the model small_cnn"):
        ba.load("x.safetensors")


def test_it_is_imported_when_it_is_needed():
    code = "import sys, bilevel_at, bilevel_at.run, bilevel_at.runs.networks; print('safetensors' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "False\n", done


def test_without_safetensors_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ba.InputError, match="pip install safetensors"):
        ba.load(NAME)


def test_export_is_public():
    assert ba.export is export
