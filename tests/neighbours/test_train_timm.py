"""timm's networks by name: in the run command, loaded, evaluated, refused in a line where they cannot be had."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands import evaluate as evaluate_command
from bilevel_at.models import build_model
from bilevel_at.problems import fastbat
from bilevel_at.solvers import HessianFreeKKT

timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")


def test_a_run_is_trained_loaded_and_evaluated(example, monkeypatch, capsys):
    found = example("train_timm")
    assert found["same"] and found["accuracy"] > 0.2  # a tenth is chance
    config = json.loads(Path("runs/timm/config.json").read_text())
    assert config["model"] == "timm:resnet10t" and config["versions"]["timm"] == timm.__version__
    assert evaluate_command.command(["runs/timm", "--attacks", "clean", "--checks", "0", "--which", "last"]) == 0
    torch.save(found["model"].state_dict(), "weights.pt")
    words = ["weights.pt", "--model", "timm:resnet10t", "--examples", "60", "--attacks", "clean", "--checks", "0"]
    assert evaluate_command.command(words) == 0
    accuracy = [json.loads(Path(p, "results.json").read_text()) for p in ("runs/timm", "weights-evaluation")]
    assert accuracy[0]["last"]["clean"]["accuracy"] == accuracy[1]["model"]["clean"]["accuracy"]
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it fails now
    with pytest.raises(ba.InputError, match="timm:resnet10t is of timm, which is not installed: pip install timm"):
        ba.load("runs/timm", "last")


def test_a_dry_run(capsys):
    assert run_module.run(["fastbat", "--model", "timm:resnet10t", "--dry-run"]) == 0
    assert "timm:resnet10t of 4,9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("resnet81", (3, 32, 32), "no model 'resnet81'; near it are timm:resnet18"),
        ("zzzz", (3, 32, 32), r"no model 'zzzz'; timm.list_models\(\) has the names"),
        ("", (3, 32, 32), "no model ''"),
        ("hf-hub:someone/resnet18", (3, 32, 32), "no model 'hf-hub:someone/resnet18'"),
        (
            "resnet18.a1_in1k",
            (3, 32, 32),
            "names trained weights, which are not downloaded; timm:resnet18 is",
        ),
        ("nest_tiny", (3, 8, 8), r"timm cannot build nest_tiny for images of \(3, 8, 8\) in 10 classes: First level"),
    ],
)
def test_what_cannot_be_had_is_a_line(name, shape, says):
    with pytest.raises(ba.InputError, match=says) as error:
        build_model(f"timm:{name}", shape, 10)
    assert "\n" not in str(error.value)


def test_images_that_are_too_small_are_a_line(elsewhere):
    with pytest.raises(ba.InputError, match=r"the model does not take \(1, 8, 8\) images") as error:
        run_module.run(["fastbat", "--model", "timm:vit_tiny_patch16_224", "--dry-run"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "efficientnet_b0"])
def test_the_implicit_term_goes_through(name):
    """Fused attention, and activations of timm's own, would have no second derivative."""
    model = build_model(f"timm:{name}", (1, 32, 32), 7)
    step = HessianFreeKKT().backward(
        fastbat.problem(step=0.01), model, ba.Batch(torch.rand(2, 1, 32, 32), torch.arange(2))
    )
    assert step.loss.isfinite() and step.implicit_norm > 0
    assert model.eval()(torch.rand(2, 1, 32, 32)).shape == (2, 7)


def test_activations_stand_where_relus_stood():
    kinds = {
        type(module).__name__
        for module in build_model("timm:resnet10t", (3, 32, 32), 10, activation="softplus").modules()
    }
    assert "Softplus" in kinds and "ReLU" not in kinds
    with pytest.raises(ba.InputError, match="timm:vit_tiny_patch16_224 has no ReLU that --activation could replace"):
        build_model("timm:vit_tiny_patch16_224", (3, 32, 32), 10, activation="softplus")
