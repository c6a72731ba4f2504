"""Losses, gradients, weights and logits that are not finite: where, on which examples, and what is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from preempting import differences, finished, small_trainer, stopped_at, through_a_file
from running import SHORT, complaint, run, unchecked

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands.evaluate import command as evaluate_command
from bilevel_at.data import Images
from bilevel_at.evaluate import evaluate
from bilevel_at.train import load
from bilevel_at.train.finite import NotFinite, first_not_finite, size

pytestmark = pytest.mark.usefixtures("elsewhere")


KEPT = ("model", "problem", "solver")


class Breaking(torch.nn.Module):
    """A network whose logits, or whose gradient, are not finite from one training pass on, for bright images."""

    def __init__(self, what, at, passes=10**9):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16))
        self.out, self.what, self.at, self.until, self.count = torch.nn.Linear(16, 3), what, at, at + passes, 0

    def forward(self, x):
        out = self.out(self.inner(x))
        self.count += self.training
        if not self.training or not self.at < self.count <= self.until:
            return out
        bright = x.flatten(1)[:, :1] > 0.9
        if self.what == "logits":
            return out.masked_fill(bright, torch.nan)
        return out + (out * 0).abs().sqrt()  # the value is 0 and its derivative is infinite times 0


def bright_ones(images):
    return set((images.pixels().flatten(1)[:, 0] > 0.9).nonzero().flatten().tolist())


def images(n=44):
    x = torch.randint(0, 220, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x[[3, 17, 30], 0, 0, 0] = 255
    return Images(x, torch.arange(n) % 3, 3)


def trainer(what="logits", at=0, passes=10**9, **options):
    torch.manual_seed(1)
    return small_trainer("standard", images=images(), model=Breaking(what, at, passes), augment="none", **options)


def test_the_examples_are_those_whose_loss_is_not_finite():
    """Standard training has two passes a step; the first batch with a bright image is named, with it alone."""
    t = trainer()
    with pytest.raises(NotFinite) as error:
        list(t.epochs())
    steps = [set(batch.index.tolist()) for batch in t.loader.epoch(0)]
    first = next(i for i, step in enumerate(steps) if step & bright_ones(images()))
    named = sorted(steps[first] & bright_ones(images()))
    assert sorted(error.value.samples) == named
    message = str(error.value)
    assert f"the loss is nan in step {first + 1} (epoch 1) on the training examples {named[0]}" in message
    assert "with ZeroIG" in message and message.endswith("a lower --lr (now 0.05) or --skip-nonfinite may help")
    assert "\n" not in message and math.isfinite(size(t.model).item())  # seen before the update


def test_a_gradient_that_is_not_finite_is_laid_to_its_step():
    t = trainer("gradient", at=4)
    with pytest.raises(NotFinite, match=r"is not finite after step \d \(epoch 2\), whose loss was finite, with ZeroIG"):
        list(t.epochs())
    assert first_not_finite(t.model) is not None


def test_weights_are_looked_at_before_a_checkpoint():
    """The last update of an epoch has no loss after it."""
    t = small_trainer("fastat")

    def between():
        if t.position.updates == 4:
            next(t.model.parameters()).data[0] = math.inf

    t.between = between
    with pytest.raises(NotFinite, match="is not finite after step 4"):
        list(t.epochs())
    assert t.done == 0


@pytest.mark.parametrize("name", ["fastbat", "atas", "fgsm_sdi", "subat"])
def test_an_update_that_is_left_out_leaves_no_trace(name):
    """The second update of epoch 1 is not finite: all but the draws and the clocks are as before it."""
    states, t = [], small_trainer(name, skip_nonfinite=True)
    plain, calls = t.solver.hypergradient, [0]

    def broken(*args, **options):
        calls[0] += 1
        step = plain(*args, **options)
        if calls[0] == 2:
            step.losses[0] = math.nan
        return step

    object.__setattr__(t.solver, "hypergradient", broken)
    t.between = lambda: states.append(through_a_file({name: t.state_dict()[name] for name in KEPT}))
    lines = [epoch.asdict() for epoch in t.epochs()]
    assert differences(states[0], states[1]) == [] and differences(states[1], states[2])
    assert [line["skipped"] for line in lines] == [1, 0, 0]
    assert all(math.isfinite(line["loss"]) for line in lines) and math.isfinite(size(t.model).item())


def test_nothing_is_left_out_where_everything_is_finite():
    lines, history = finished(small_trainer("fastbat"))
    skipping = small_trainer("fastbat", skip_nonfinite=True)
    again, other = finished(skipping)
    assert [line["loss"] for line in lines] == [line["loss"] for line in again]
    assert differences(history, other) == [] and "hypergradient" not in vars(skipping.solver)


def test_what_was_left_out_is_counted_after_a_stop_too():
    make = lambda: trainer(at=0, passes=10**9, skip_nonfinite=True)  # noqa: E731
    lines, _ = finished(make())
    assert lines[0]["skipped"] > 0
    state, before, written = stopped_at(make(), 3)
    again = make()
    again.load_state_dict(state)
    assert [line["skipped"] for line in before + finished(again)[0]] == [line["skipped"] for line in lines]


def test_an_epoch_without_an_update_stops():
    t = small_trainer("fastat", skip_nonfinite=True)
    next(t.model.parameters()).data[0] = math.nan
    with pytest.raises(NotFinite, match="not finite"):
        list(t.epochs())


OWN = """
import torch
from bilevel_at.problems.fastat import problem
class Net(torch.nn.Linear):
    count = 0
    def forward(self, x):
        out = super().forward(x.flatten(1))
        self.count += self.training
        return out * float("nan") if {when} else out
def model(shape, classes):
    return Net(64, classes)
"""


def test_a_run_keeps_what_was_good():
    """From the third epoch on the loss is not finite: two epochs stay, exit by one line, and it goes on without."""
    Path("mine.py").write_text(OWN.format(when="self.training and self.count > 2 * 2 * 4 + 2"))
    args = ["mine.py", "--batch-size", "25", *SHORT[2:], "--epochs", "4", "--out", "out"]
    with pytest.raises(ba.BilevelError) as error:
        run_module.run(args)
    message = str(error.value)
    assert message.startswith("mine: the loss is nan in step ") and "(epoch 3) on the training examples" in message
    assert message.endswith("(epoch 3; what was done is in out)") and "\n" not in message
    for which in ("last", "best"):
        state = torch.load(f"out/{which}.pt", weights_only=True)
        assert state["epochs"] <= 2 and all(t.isfinite().all() for t in state["model"].values())
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 2
    run(*args, "--resume", "--skip-nonfinite")  # a new process would count its passes from 0, as this network does
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_counts_what_it_leaves_out():
    Path("mine.py").write_text(OWN.format(when="self.training and 2 < self.count <= 6"))
    run("mine.py", "--batch-size", "25", *SHORT[2:], "--epochs", "2", "--out", "out", "--skip-nonfinite")
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [2, 0] and all(math.isfinite(line["loss"]) for line in lines)


def test_logits_of_held_out_images_that_are_not_finite_stop_the_run():
    Path("mine.py").write_text(OWN.format(when="not self.training and self.count"))
    with pytest.raises(ba.BilevelError, match="mine: the network's logits are not finite on 10 of 10 clean images"):
        run_module.run(["mine.py", *SHORT, "--out", "out"])
    assert not list(Path("out").glob("best.pt")) and not list(Path("out").glob("last.pt"))


def test_a_network_that_is_not_finite_is_not_evaluated():
    run("problems/fastat.py", *SHORT, "--out", "out")
    state = torch.load("out/last.pt", weights_only=True)
    next(iter(state["model"].values()))[0] = math.nan
    unchecked("out")
    torch.save(state, "out/last.pt")
    with pytest.raises(ba.InputError, match=r"last of out is not a finite network \(\S+ is not\)"):
        evaluate_command(["out", "--which", "last"])
    with pytest.raises(ba.BilevelError, match="logits are not finite on 60 of 60 clean images"):
        evaluate(load("out", "last"), (torch.rand(60, 1, 8, 8), torch.arange(60) % 10), "clean", checks=0)


def test_a_checkpoint_that_is_not_finite_is_not_written(monkeypatch):
    """By time, at every update: the last one that is finite stays."""
    Path("mine.py").write_text(OWN.format(when="self.training and self.count > 7"))
    args = ["mine.py", "--batch-size", "25", *SHORT[2:], "--epochs", "2", "--out", "out", "--save-every", "1e-9"]
    with pytest.raises(ba.BilevelError, match="the loss is nan"):
        run_module.run(args)
    state = torch.load("out/midway.pt", weights_only=True)
    assert state["position"]["updates"] > 0 and all(t.isfinite().all() for t in state["model"].values())


def test_minutes_are_not_negative():
    assert "--save-every is -1" in complaint("problems/fastat.py", "--save-every", "-1")


def test_weights_that_are_large_are_finite():
    """Their norm overflows in float32."""
    t = trainer(at=10**9)
    t.model.inner[1].weight.data.fill_(1e30)
    assert not math.isfinite(size(t.model).item()) and first_not_finite(t.model) is None
    t.check()
    t.sentinel.look(torch.zeros(()))
