"""The evaluate command on mistakes, damaged files and hostile ones."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating_runs import CHECKPOINT, ONE, arrays, complaint, evaluate, read
from marks import fast

import bilevel_at as ba

pytestmark = pytest.mark.usefixtures("run_here")


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


DAMAGED = ["", "{", "[]", "3", '{"last": 3}', '{"last": {"pgd-2-1": []}}', "\udcff"]


@pytest.mark.parametrize("name", ["results.json", "checks.json", "evaluation/commands.json"])
@pytest.mark.parametrize("content", fast(DAMAGED, ["{", '{"last": 3}']))
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


@pytest.mark.slow
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
        (["nowhere"], "nowhere does not exist; give a run directory, a file of weights, or digits-fastbat"),
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
