"""A run on disk: checkpoints and their format, and that nothing is ever half written."""

from __future__ import annotations

import json

import pytest
import torch

import bilevel_at as ba
from bilevel_at.runs.checkpoints import FORMAT
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.keeper import Keeper
from bilevel_at.runs.metrics import Epoch

STATE = {"model": {"weight": torch.ones(2)}}


def epoch(number, robust, train=0.5):
    settings = {"attack": "fgsm", "implicit_ratio": 0.0, "perturbation": 0.1, "lr": 0.1, "seconds": 1.0}
    return Epoch(epoch=number, loss=1.0, train=train, clean=0.9, robust=robust, train_seconds=1.0, **settings)


def test_a_checkpoint_says_its_format(tmp_path):
    run = RunDir(tmp_path)
    run.save_checkpoint("last", STATE)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["format"] == FORMAT
    assert run.checkpoint("last")["model"]["weight"].tolist() == [1, 1] and run.checkpoints == ["last"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (STATE, "format 1, of a bilevel-at that is older; this one reads format 3"),
        ({**STATE, "format": FORMAT + 1}, f"format {FORMAT + 1}, of a bilevel-at that is newer"),
        ({**STATE, "format": "2"}, "is not a checkpoint of bilevel_at.run"),
        ({**STATE, "format": True}, "is not a checkpoint of bilevel_at.run"),
        ([1, 2], "is not a checkpoint of bilevel_at.run"),
        (torch.ones(2), "is not a checkpoint of bilevel_at.run"),
    ],
)
def test_a_checkpoint_of_another_format_is_refused_by_name(tmp_path, content, why):
    torch.save(content, tmp_path / "best.pt")
    (tmp_path / "config.json").write_text(json.dumps({"model": "small_cnn", "shape": [1, 8, 8], "classes": 10}))
    for read in (RunDir(tmp_path).checkpoint, lambda which: ba.load(tmp_path, which)):
        with pytest.raises(ba.InputError, match="best.pt.*" + why) as error:
            read("best")
        assert str(error.value).isprintable()


def test_the_keeper_keeps_the_best_the_last_and_the_last_good(tmp_path):
    keeper = Keeper(RunDir(tmp_path))
    collapses = []
    for number, robust in enumerate((0.3, 0.5, 0.4, 0.1, 0.05), 1):
        state = {"model": {"weight": torch.full((1,), float(number))}, "epochs": number}
        collapses.append(keeper.keep(epoch(number, robust, train=0.5 + 0.1 * number), state, {}))
    run = RunDir(tmp_path)
    kept = {which: run.checkpoint(which)["model"]["weight"].item() for which in run.checkpoints}
    assert kept == {"best": 2, "last": 5, "last_good": 3}
    assert [collapse is not None for collapse in collapses] == [False, False, False, True, False]
    assert Keeper(RunDir(tmp_path)).lines == keeper.lines and not list(tmp_path.glob(".*"))


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.save_checkpoint("last", STATE)

    def fails(value, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint("last", {"model": {}})
    assert run.checkpoint("last")["model"]["weight"].tolist() == [1, 1] and not list(tmp_path.glob(".*"))
