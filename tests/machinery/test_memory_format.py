"""--memory-format: what measuring leaves untouched, what is recorded and kept, and that it does not change training."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from running import SHORT, complaint, run, same, unchecked, weights

import bilevel_at as ba
from bilevel_at import policy
from bilevel_at.commands import layout
from bilevel_at.models import build_model
from bilevel_at.problems import atas, fastbat
from bilevel_at.report.groups import group
from bilevel_at.runs.record import read
from bilevel_at.train.memory_format import FORMATS, seconds_by_memory_format

pytestmark = pytest.mark.usefixtures("elsewhere")
ARGS = ["problems/fastbat.py", *SHORT[2:]]


def batch_of(examples=6):
    g = torch.Generator().manual_seed(0)
    index = torch.arange(examples)
    return ba.Batch(torch.rand(examples, 3, 8, 8, generator=g), index % 3, index, examples=20)


def recorded(out="out"):
    return json.loads(Path(out, "config.json").read_text())["memory_format"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [atas, fastbat])
def test_measuring_times_both_and_leaves_everything_as_it_was(method, precision):
    torch.manual_seed(0)
    model = torch.nn.Sequential(build_model("small_resnet", (3, 8, 8), 3), torch.nn.Dropout(0.5)).eval()
    problem, solver = method.problem(0.1), method.solver()
    policy.set_epoch((problem, solver), 2, 9)
    solver.backward(problem, model, batch_of(), torch.Generator())  # something is remembered
    before = copy.deepcopy((model.state_dict(), policy.state_of((problem, solver))))
    strides, state = [p.stride() for p in model.parameters()], torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters()]
    seconds = seconds_by_memory_format(problem, solver, model, batch_of(), precision)
    assert list(seconds) == list(FORMATS) and all(value > 0 for value in seconds.values())
    after = (model.state_dict(), policy.state_of((problem, solver)))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state) and not any(m.training for m in model.modules())
    assert [p.stride() for p in model.parameters()] == strides
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_without_a_convolution_there_is_nothing_to_choose():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    assert seconds_by_memory_format(fastbat.problem(0.1), fastbat.solver(), model, batch_of()) == {}


def test_on_a_cpu_auto_is_contiguous_and_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(layout, "seconds_by_memory_format", None)
    run(*ARGS, "--epochs", 1, "--out", "out")
    assert recorded() == {"name": "contiguous", "seconds": {}}
    run(*ARGS, "--epochs", 1, "--out", "forced", "--memory-format", "contiguous")
    assert same(weights("out"), weights("forced"))
    assert json.loads(Path("out/config.json").read_text())["options"]["memory_format"] == "auto"


def test_what_was_measured_is_recorded_and_a_resumed_run_keeps_it(monkeypatch):
    """The choice of a GPU, made here on a CPU."""
    monkeypatch.setattr(layout, "MEASURED_ON", ("cpu",))
    measure, times = layout.seconds_by_memory_format, []

    def measured(problem, solver, model, batch, precision):
        times.append(measure(problem, solver, model, batch, precision))
        assert len(batch) == 64 and list(times[-1]) == list(FORMATS)
        return {"contiguous": 2.0, "channels_last": 1.0}

    monkeypatch.setattr(layout, "seconds_by_memory_format", measured)
    run(*ARGS, "--epochs", 1, "--out", "out")
    chosen = {"name": "channels_last", "seconds": {"contiguous": 2.0, "channels_last": 1.0}}
    assert recorded() == chosen and len(times) == 1
    seen = []
    asdict = layout.Layout.asdict
    monkeypatch.setattr(layout.Layout, "asdict", lambda self: seen.append(self.name) or asdict(self))
    run(*ARGS, "--epochs", 1, "--out", "out", "--resume")
    assert seen == ["channels_last"] and len(times) == 1 and recorded() == chosen
    config = json.loads(Path("out/config.json").read_text())
    config["machine"]["device"] = "another"
    unchecked("out")
    Path("out/config.json").write_text(json.dumps(config))
    run(*ARGS, "--epochs", 1, "--out", "out", "--resume")
    assert len(times) == 2  # it was the choice for another device


def test_a_run_from_before_the_option_goes_on():
    run(*ARGS, "--epochs", 1, "--out", "out")
    config = json.loads(Path("out/config.json").read_text())
    for other in (None, {"name": [], "seconds": {}}, {"name": "other", "seconds": {}}):
        unchecked("out")
        Path("out/config.json").write_text(json.dumps({**config, "memory_format": other}))
        run(*ARGS, "--epochs", 1, "--out", "out", "--resume")
    del config["memory_format"], config["options"]["memory_format"]
    unchecked("out")
    Path("out/config.json").write_text(json.dumps(config))
    run(*ARGS, "--epochs", 1, "--out", "out", "--resume")
    unchecked("out")
    Path("out/config.json").write_text("[]")
    assert "is not one of bilevel_at.run" in complaint(*ARGS, "--epochs", 1, "--out", "out", "--resume")


def test_channels_last_trains_to_nearly_the_same_weights():
    run(*ARGS, "--epochs", 2, "--out", "plain")
    run(*ARGS, "--epochs", 2, "--out", "last", "--memory-format", "channels_last")
    run(*ARGS, "--epochs", 2, "--out", "other", "--seed", 1)
    plain, last, other = (weights(out) for out in ("plain", "last", "other"))
    convolution = next(name for name, value in plain.items() if value.ndim == 4)
    assert last[convolution].is_contiguous(memory_format=torch.channels_last) and recorded("last")["seconds"] == {}
    assert plain[convolution].is_contiguous()

    def distance(one):
        return max((one[name] - plain[name]).norm() / plain[name].norm() for name in plain if plain[name].ndim > 1)

    assert distance(last) < 1e-3 < 0.1 < distance(other)
    run(*ARGS, "--epochs", 2, "--out", "last", "--resume")  # auto keeps it
    assert recorded("last")["name"] == "channels_last"
    assert [len(part.runs) for part in group([read("last"), read("other")])] == [2]  # seeds of one training
