"""``python -m bilevel_at.evaluate``: results and their files, interruption, weights from elsewhere, mistakes."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands.evaluate import command
from bilevel_at.data import load_data
from bilevel_at.evaluate import ATTACKS
from bilevel_at.models import build_model
from bilevel_at.runs import evaluations

EPS = 0.2
PYTHON = [sys.executable, "-m", "bilevel_at.evaluate"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few seconds, which nothing has been evaluated on."""
    path = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--epochs", "5", "--attacks", "clean", "--select", "pgd-2-1", "--out", str(path)]
    assert run_module.run(["problems/fastat.py", *flags]) == 0
    shutil.rmtree(path / "evaluation")
    (path / "results.json").unlink()
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, trained):
    """Every test in a directory of its own, with the run in ``run`` and its weights in ``weights.pt``."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    torch.save(ba.load("run", "last").state_dict(), "weights.pt")


def evaluate(*args):
    assert command([str(a) for a in args]) == 0


def complaint(*args):
    """What the command says of a mistake; it must be one line, and nothing may have been written."""
    before = {p: p.stat().st_mtime_ns for p in sorted(Path().rglob("*"))}
    with pytest.raises((ba.InputError, ba.BilevelError)) as error:
        command([str(a) for a in args])
    assert {p: p.stat().st_mtime_ns for p in sorted(Path().rglob("*"))} == before
    line = str(error.value)
    assert line.isprintable() and len(line) < 400
    return line


def read(path):
    return json.loads(Path(path).read_text())


def arrays(path):
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


QUICK = ["--checks", 0]
ONE = ["--which", "last", *QUICK]
CHECKPOINT = ["weights.pt", "--model", "small_cnn", "--epsilon", EPS]


# --- what should work -------------------------------------------------------------------------------------------------


def test_results_say_what_they_are(capsys):
    evaluate("run", "--attacks", "clean", "fgsm", "pgd-5-2", "beta-3", "--epsilon", EPS, "8/255", "--examples", 50)
    shown = capsys.readouterr().out
    results = read("run/results.json")
    assert set(results) == {"best", "last"}
    names = {"clean", "fgsm", "pgd-5-2", "beta-3", "fgsm@8/255", "pgd-5-2@8/255", "beta-3@8/255"}
    for which, entries in results.items():
        assert set(entries) == names
        for name, entry in entries.items():
            attack, _, radius = name.partition("@")
            assert (entry["attack"], entry["n"]) == (attack, 50) and entry["seconds"] >= 0
            assert entry["norm"] == (None if attack == "clean" else "linf")
            assert entry["epsilon"] == (0 if attack == "clean" else 8 / 255 if radius else EPS)
            assert {"torch", "pyautoattack", "bilevel-at", "python"} <= set(entry["versions"])
            assert re.fullmatch("[0-9a-f]{16}", entry["data"]) and re.fullmatch("[0-9a-f]{16}", entry["weights"])
            file = arrays(Path("run", entry["file"]))
            assert file["correct"].mean() == pytest.approx(entry["accuracy"]) and file["correct"].shape == (50,)
            assert file["label"].shape == (50,) and (file["correct"] == (file["broken"] == -1)).all()
            assert bool(file["finished"]) and ((file["said"] == file["label"]) == file["correct"]).all()
            assert f"{which}  {name}  {entry['accuracy']:.1%}" in shown
        assert entries["pgd-5-2"]["accuracy"] <= entries["pgd-5-2@8/255"]["accuracy"] <= entries["clean"]["accuracy"]
    assert results["best"]["clean"]["data"] == results["last"]["clean"]["data"]
    checks = read("run/checks.json")
    assert set(checks) == {"best", "last"} and checks["last"]["measured"]["n"] == 50
    assert all(set(w) == {"name", "message"} for entry in checks.values() for w in entry["warnings"])


def test_what_is_there_is_not_computed_again():
    evaluate("run", "--attacks", "clean", "pgd-5-2")
    first, files = read("run/results.json"), {p: p.read_bytes() for p in Path("run").rglob("*.npz")}
    evaluate("run", "--attacks", "clean", "pgd-5-2")
    assert read("run/results.json") == first
    assert all(p.read_bytes() == content for p, content in files.items())
    assert len(read("run/evaluation/commands.json")) == 1
    evaluate("run", "--attacks", "clean", "pgd-5-2", "--again", "--which", "last")
    again = read("run/results.json")
    assert again["best"] == first["best"] and again["last"] != first["last"]
    assert again["last"]["pgd-5-2"]["accuracy"] == first["last"]["pgd-5-2"]["accuracy"]
    evaluate("run", "--attacks", "pgd-5-2", "--examples", 100, *ONE)
    fewer = read("run/results.json")["last"]
    assert fewer["pgd-5-2"] == again["last"]["pgd-5-2"] and fewer["pgd-5-2[n=100]"]["n"] == 100


def test_l2_and_a_curve_beside_what_is_there():
    evaluate("run", "--attacks", "pgd-5-1", *ONE)
    before = read("run/results.json")["last"]["pgd-5-1"]
    evaluate("run", "--attacks", "pgd-5-1", "--norm", "l2", "--epsilon", "0.5", *ONE)
    after = read("run/results.json")["last"]
    assert after["pgd-5-1"] == before
    (other,) = (entry for entry in after.values() if entry["norm"] == "l2")
    assert other["epsilon"] == 0.5 and other["accuracy"] != before["accuracy"]
    assert "--epsilon" in complaint("run", "--norm", "l2", *ONE)  # 0.2 is the radius of another ball


def test_transfer_from_another_run():
    flags = ["--epochs", "1", "--examples", "100", "--attacks", "clean", "--select", "pgd-2-1", "--out", "other"]
    assert run_module.run(["problems/standard.py", *flags]) == 0
    attacks = ["transfer:other", "transfer:other:fgsm", "transfer:run:fgsm", "pgd-50-1", "fgsm"]
    evaluate("run", "--attacks", *attacks, "--which", "best", *QUICK, "--examples", 100)
    found = read("run/results.json")["best"]
    assert set(found) == set(attacks)
    assert found["transfer:other"]["accuracy"] >= found["pgd-50-1"]["accuracy"]
    assert found["transfer:run:fgsm"]["accuracy"] == found["fgsm"]["accuracy"]  # the network itself
    shutil.copy("run/last.pt", "other/best.pt")
    evaluate("run", "--attacks", *attacks, "--which", "best", *QUICK, "--examples", 100)
    assert read("run/results.json")["best"]["transfer:other:fgsm"] != found["transfer:other:fgsm"]  # another surrogate


def test_help_and_list(capsys):
    for args in (["--help"], [], ["-h"]):
        assert command(args) == 0
        assert "usage: python -m bilevel_at.evaluate RUN" in capsys.readouterr().out
    assert command(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and about in listed for name, about in ATTACKS.items())
    with pytest.raises(SystemExit) as end:
        command(["run", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{flag}" in shown for flag in ("attacks", "epsilon", "norm", "which", "examples", "again", "seed"))
    done = subprocess.run([*PYTHON, "run", "--epsilon", "-1"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("bilevel_at.evaluate: epsilon is -1")


# --- interruption -----------------------------------------------------------------------------------------------------

AUTOATTACK = ["run", "--attacks", "autoattack", "--which", "last", "--examples", "16", "--batch-size", "8"]
STATE = Path("run/evaluation/last/autoattack.npz")


def position():
    try:
        return tuple(arrays(STATE)["position"][:2])
    except (OSError, KeyError, ValueError, EOFError):
        return (0, 0)


def wait_for(process, stage):
    deadline = time.monotonic() + 120
    while position()[0] < stage and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


@pytest.fixture(scope="module")
def unbroken(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    shutil.copytree(trained, folder / "run")
    before = Path.cwd()
    os.chdir(folder)
    try:
        evaluate(*AUTOATTACK, "--checks", 0)
        return arrays(STATE)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_autoattack_goes_on(interruptible, unbroken, how):
    args = [*AUTOATTACK, "--checks", "0"]
    process = interruptible([*PYTHON, *args])
    wait_for(process, 1)
    if how == signal.SIGINT:
        time.sleep(0.5)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in said
        assert said.splitlines()[-1] == "bilevel_at.evaluate: stopped: what is done is in run; the same command goes on"
    else:
        assert process.returncode == -signal.SIGKILL
    assert not Path("run/results.json").exists() and not bool(arrays(STATE)["finished"])
    left, stopped = position(), arrays(STATE)
    assert left >= (1, 0)
    done = stopped["broken"] >= 0
    honest, told = evaluations.attack_examples, []

    def listen(*positional, **named):
        for state in honest(*positional, **named):
            told.append((state[0].stage, state[2]))
            yield state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluations, "attack_examples", listen)
        evaluate(*args)
    assert told and told[0] > left  # nothing finished is done again
    final = arrays(STATE)
    for name in ("broken", "said", "correct", "label"):
        assert (final[name] == unbroken[name]).all(), name
    assert (final["broken"][done] == stopped["broken"][done]).all() and float(final["seconds"]) >= stopped["seconds"]
    entry = read("run/results.json")["last"]["autoattack"]
    assert entry["accuracy"] == pytest.approx(unbroken["correct"].mean()) and entry["seconds"] >= stopped["seconds"]


# --- weights from elsewhere -------------------------------------------------------------------------------------------


def correct(path="weights-evaluation"):
    return arrays(Path(path, read(Path(path, "results.json"))["model"]["pgd-5-1"]["file"]))["correct"]


WRAPPED = {
    "plain": lambda s: s,
    "in a state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "in a model": lambda s: {"model": s, "best_acc": 0.5, "note": "mine"},
    "twice": lambda s: {"net": {"state_dict": s}},
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "module. in a state_dict": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "module._orig_mod.": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "_orig_mod.module.": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_state_dict(how):
    evaluate("run", "--attacks", "pgd-5-1", *ONE)
    expected = arrays(Path("run/evaluation/last/pgd-5-1.npz"))["correct"]
    state = torch.load("weights.pt", weights_only=True)
    torch.save(WRAPPED[how](state), "weights.pt")
    evaluate(*CHECKPOINT, "--attacks", "clean", "pgd-5-1", *QUICK)
    assert (correct() == expected).all()
    assert set(read("weights-evaluation/results.json")) == {"model"}
    torch.save(WRAPPED[how]({k.removeprefix("network."): v for k, v in state.items() if "." in k}), "inner.pt")
    assert "does not say how inputs are normalised; give --mean and --std" in complaint(
        "inner.pt", *CHECKPOINT[1:], *QUICK
    )
    mean, std = (float(state[k].flatten()[0]) for k in ("mean", "std"))
    evaluate("inner.pt", *CHECKPOINT[1:], "--mean", mean, "--std", std, "--attacks", "pgd-5-1", *QUICK, "--out", "in")
    assert (correct("in") == expected).all()


def test_weights_are_what_the_network_is():
    """The same file as another network (here its activation) is another network: nothing is reused."""
    evaluate(*CHECKPOINT, "--attacks", "clean", *QUICK)
    first = read("weights-evaluation/results.json")["model"]["clean"]
    try:
        evaluate(*CHECKPOINT, "--attacks", "clean", *QUICK, "--activation", "softplus")
    except ba.InputError:
        return  # to refuse would be right, too
    model = build_model("small_cnn", (1, 8, 8), 10, activation="softplus")
    model.load_state_dict(torch.load("weights.pt", weights_only=True))
    test = load_data("digits")[1]
    with torch.no_grad():
        expected = (model.eval()(test.x).argmax(1) == test.y).float().mean().item()
    second = read("weights-evaluation/results.json")["model"]["clean"]
    assert expected != first["accuracy"] and second["accuracy"] == pytest.approx(expected)


def test_weights_twice_by_two_names_of_the_same_file():
    evaluate(*CHECKPOINT, "--attacks", "clean", *QUICK)
    evaluate(Path("weights.pt").resolve(), *CHECKPOINT[1:], "--attacks", "fgsm", *QUICK)
    assert set(read("weights-evaluation/results.json")["model"]) == {"clean", "fgsm"}


class Malicious:
    def __reduce__(self):
        return (open, ("stolen", "w"))


def harmful():
    return {"state_dict": Malicious(), "model": {"network.0.weight": Malicious()}}


def test_a_malicious_pickle_does_not_run():
    torch.save(harmful(), "bad.pt")
    assert "which is not unpickled because that can run code" in complaint("bad.pt", *CHECKPOINT[1:])
    Path("raw.pt").write_bytes(pickle.dumps(harmful()))
    assert "raw.pt is not a checkpoint of tensors" in complaint("raw.pt", *CHECKPOINT[1:])
    torch.save(harmful(), "run/best.pt")
    assert "best.pt is not a checkpoint of tensors" in complaint("run")
    assert "best.pt is not a checkpoint" in complaint(*CHECKPOINT, "--attacks", "transfer:run")
    evaluate("run", "--attacks", "pgd-5-1", *ONE)
    path = Path("run/evaluation/last/pgd-5-1.npz")
    kept = arrays(path)
    for name in kept:
        with open(path, "wb") as file:
            np.savez(file, **{**kept, name: np.array([Malicious()], dtype=object)})
        evaluate("run", "--attacks", "pgd-5-1", *ONE)
        assert (arrays(path)["broken"] == kept["broken"]).all()
    for content in (pickle.dumps(Malicious()), b"\x80\x04."):
        path.write_bytes(content)
        evaluate("run", "--attacks", "pgd-5-1", *ONE)
    assert not Path("stolen").exists()


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"model": 5}, {"epochs": 1}, {}, torch.zeros(3), {"model": {"a": torch.zeros(2)}}, {"average": 1}],
)
def test_checkpoints_that_are_something_else(content):
    torch.save(content, "run/last.pt")
    assert "last.pt" in complaint("run", *ONE)
    torch.save(content, "weights.pt")
    assert "weights.pt" in complaint(*CHECKPOINT)


def test_a_checkpoint_that_contains_itself():
    recursive = {}
    recursive["model"] = recursive
    torch.save(recursive, "weights.pt")
    done = subprocess.run([*PYTHON, *map(str, CHECKPOINT)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


# --- damaged files, and mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["results.json", "checks.json", "evaluation/commands.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"last": 3}', '{"last": {"pgd-2-1": []}}', "\udcff"])
def test_damaged_json(name, content):
    """Replaced, or said in one line."""
    evaluate("run", "--attacks", "pgd-2-1", "--which", "last", "--checks", 5)
    Path("run", name).write_bytes(content.encode("utf-8", "surrogateescape"))
    shutil.rmtree("run/evaluation/last")
    try:
        evaluate("run", "--attacks", "pgd-2-1", "--which", "last", "--checks", 5)
    except ba.InputError as error:
        assert "\n" not in str(error) and Path(name).name in str(error)
    else:
        assert read("run/results.json")["last"]["pgd-2-1"]["n"] == 360 and "warnings" in read("run/checks.json")["last"]


def test_damaged_state_files():
    evaluate("run", "--attacks", "pgd-2-1", *ONE)
    path, first = Path("run/evaluation/last/pgd-2-1.npz"), read("run/results.json")["last"]["pgd-2-1"]["accuracy"]
    content = path.read_bytes()
    g = np.random.default_rng(0)
    damaged = [content[:k] for k in range(0, len(content), 401)]
    for _ in range(60):
        flipped = bytearray(content)
        for at in g.integers(0, len(content), 4):
            flipped[at] ^= 1 << g.integers(8)
        damaged.append(bytes(flipped))
    for changed in damaged:
        path.write_bytes(changed)
        evaluate("run", "--attacks", "pgd-2-1", *ONE)
        assert read("run/results.json")["last"]["pgd-2-1"]["accuracy"] == first


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nowhere"], "nowhere does not exist; give a run directory, or a file of weights"),
        (["empty"], "empty has no config.json"),
        (["--attacks", "clean"], "the run comes first"),
        (["run", "--attacks", "autoatack"], "attack 'autoatack' is not known"),
        (["run", "--attacks", "pgd-5-0"], "attack 'pgd-5-0' is not known"),
        (["run", "--attacks", "transfer:nowhere"], "nowhere has no config.json"),
        (["run", "--attacks"], "attacks"),
        (["run", "--epsilon", "8/0"], "8/0"),
        (["run", "--epsilon", "nan"], "epsilon is nan"),
        (["run", "--epsilon", "0.1", "-1"], "epsilon is -1"),
        (["run", "--norm", "l1"], "l1"),
        (["run", "--which", "last_good"], "run has no last_good.pt; it has best.pt, last.pt"),
        (["run", "--which", "first"], "first"),
        (["run", "--examples", "0"], "--examples is 0; it must be at least 1"),
        (["run", "--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["run", "--checks", "-1"], "--checks is -1; it must be at least 0"),
        (["run", "--seed", "-1"], "--seed is -1"),
        (["run", "--device", "tpu"], "tpu"),
        (["run", "--epsilom", "1"], "--epsilom is not a flag here; did you mean --epsilon?"),
        (["run", "--model", "small_cnn"], "--model is for weights from elsewhere"),
        (["run", "--data", "nothing.npz"], "nothing.npz"),
        (["run", "--data", "mnist"], "data 'mnist' is not known"),
        (["run", "more"], "'more' is one argument too many"),
        (["weights.pt"], "weights.pt is a file of weights; say whose with --model"),
        (["weights.pt", "--model", "small_cnn"], "--epsilon is missing"),
        (["weights.pt", "--model", "big_cnn", "--epsilon", "0.1"], "model 'big_cnn' is not known"),
        (["weights.pt", "--model", "one_layer_cnn", "--epsilon", "0.1"], "does not fit the model one_layer_cnn"),
        ([*CHECKPOINT, "--which", "last"], "--which is for runs"),
        ([*CHECKPOINT, "--mean", "0"], "says itself how inputs are normalised"),
        ([*CHECKPOINT, "--activation", "sine"], "sine"),
        ([*CHECKPOINT, "--attacks", "autoatack"], "attack 'autoatack' is not known"),
        ([*CHECKPOINT, "--attacks", "transfer:nowhere"], "nowhere has no config.json"),
        ([*CHECKPOINT, "--norm", "l1"], "l1"),
        (["weights.pt", "--model", "small_cnn", "--epsilon", "-1"], "epsilon is -1"),
        ([*CHECKPOINT, "--out", "run"], "run holds something else; choose another --out"),
        ([*CHECKPOINT, "--out", "weights.pt"], "weights.pt"),
        (["text.pt", *CHECKPOINT[1:]], "text.pt is not a checkpoint of tensors"),
    ],
)
def test_mistakes(args, says):
    Path("empty").mkdir()
    Path("text.pt").write_text("hello")
    assert says in complaint(*args)


def test_checks_are_of_the_images_at_hand():
    """Other labels for the same network: what was measured before says nothing about them."""
    train, test = load_data("digits")
    x = {"x_train": train.x.numpy(), "x_test": test.x.numpy()}
    np.savez("moved.npz", **x, y_train=train.y.numpy(), y_test=(test.y.numpy() + 1) % 10)
    evaluate("run", "--attacks", "clean", "--which", "last", "--checks", 50)
    assert read("run/checks.json")["last"]["measured"]["fgsm"] > 0.1
    evaluate("run", "--attacks", "clean", "--which", "last", "--checks", 50, "--data", "moved.npz")
    assert read("run/checks.json")["last"]["measured"]["fgsm"] < 0.1


def test_large_seeds_are_seeds():
    evaluate("run", "--attacks", "pgd-2-1", "apgd-ce", "--seed", 2**32 - 1, "--examples", 5, *ONE)
    assert read("run/results.json")["last"]["pgd-2-1"]["seed"] == 2**32 - 1


def test_a_network_of_the_problem_file_and_other_images():
    Path("mine.py").write_text(
        "import torch\nimport bilevel_at as ba\nfrom bilevel_at.problems.fastat import problem\n"
        "def model(shape, classes):\n    d = shape[0] * shape[1] * shape[2]\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(d, classes))\n"
    )
    g = np.random.default_rng(0)
    x = g.integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    np.savez("data.npz", x_train=x, y_train=np.arange(40) % 5, x_test=x[:20], y_test=np.arange(20) % 5)
    flags = ["--data", "data.npz", "--epochs", "1", "--attacks", "clean", "--select", "pgd-1-1", "--model", "file"]
    assert run_module.run(["mine.py", *flags, "--epsilon", "0.1", "--out", "mine"]) == 0
    named = ["--problem-file", "mine.py"]
    evaluate("mine", "--attacks", "clean", "pgd-3-1", "autoattack-rand", "--which", "last", *named)
    assert read("mine/results.json")["last"]["pgd-3-1"]["n"] == 20
    assert "was trained on images of" in complaint("mine", "--data", "digits", *named)
    line = complaint("run", "--attacks", "transfer:mine", "--which", "last", *named)
    assert "mine" in line  # a surrogate for images of another shape
