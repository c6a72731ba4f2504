"""``--logger``: TensorBoard and Weights & Biases follow a run, once per epoch, and never stop it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, SHORT, run, same, weights

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands import logs
from bilevel_at.commands.logs import LOGS, Log, Logs

pytestmark = pytest.mark.usefixtures("elsewhere")
THREE = [*SHORT, "--epochs", "3"]
TENSORBOARD = "tensorboard is not installed: pip install 'bilevel-at[tensorboard]'"
WANDB = "wandb is not installed: pip install 'bilevel-at[wandb]'"


def metrics(folder="out"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


class Kept(Log):
    """A log in memory; what it has outlives the command, as a file would."""

    package = "torch"  # is there
    heard: list = []  # noqa: RUF012
    fails_at: tuple = ()
    with_error: BaseException = OSError("the disk is full")

    def epochs(self):
        return max((number for what, number, _ in self.heard if what == "epoch"), default=0)

    def epoch(self, number, values):
        if number in self.fails_at:
            raise self.with_error
        self.heard.append(("epoch", number, values))

    def results(self, number, values):
        self.heard.append(("results", number, values))

    def close(self):
        self.heard.append(("close", 0, {}))


@pytest.fixture
def kept(monkeypatch):
    own = type("Own", (Kept,), {"heard": []})
    monkeypatch.setitem(LOGS, "tensorboard", own)
    return own


def numbers(kept):
    return [number for what, number, _ in kept.heard if what == "epoch"]


def test_a_log_follows_the_metrics(kept):
    run("fastat", *THREE, "--out", "out", "--logger", "tensorboard")
    assert numbers(kept) == [1, 2, 3]
    for (_, _, values), line in zip(kept.heard, metrics(), strict=False):
        assert values["loss"] == line["loss"] and values["robust"] == line["robust"] and "attack" not in values
    (_, at, found) = kept.heard[3]
    results = json.loads(Path("out/results.json").read_text())
    assert at == 3 and found["best/pgd-2-1"] == results["best"]["pgd-2-1"]["accuracy"]
    assert kept.heard[-1][0] == "close"
    assert "logger" not in json.loads(Path("out/config.json").read_text())["options"]


def test_it_changes_nothing(kept):
    run("fastat", *THREE, "--out", "with", "--logger", "tensorboard")
    run("fastat", *THREE, "--out", "without")
    assert same(weights("with"), weights("without"))


@pytest.mark.parametrize("error", [OSError("the disk is full"), SystemExit(1)])
def test_a_log_that_fails_does_not_lose_the_run(kept, capsys, error):
    kept.fails_at, kept.with_error = (2,), error
    run("fastat", *THREE, "--out", "out", "--logger", "tensorboard")
    shown = capsys.readouterr().out
    assert shown.count("--logger tensorboard has stopped, and the run goes on") == 1
    assert len(metrics()) == 3 and numbers(kept) == [1]
    kept.fails_at = ()
    run("fastat", *THREE, "--out", "out", "--logger", "tensorboard", "--resume")  # and is brought up to date
    assert numbers(kept) == [1, 2, 3]


def test_a_resumed_run_goes_on_in_its_log(kept):
    kept.fails_at, kept.with_error = (2,), KeyboardInterrupt()  # Ctrl-C, between saving the epoch and its log
    with pytest.raises(KeyboardInterrupt):
        run_module.run(["fastat", *THREE, "--out", "out", "--logger", "tensorboard"])
    assert numbers(kept) == [1] and len(metrics()) == 2
    kept.fails_at = ()
    run("fastat", *THREE, "--out", "out", "--logger", "tensorboard", "--resume")
    assert numbers(kept) == [1, 2, 3]
    run("fastat", *THREE, "--out", "out", "--resume")  # without a log is no other training


def test_a_package_that_is_missing_is_one_line_and_nothing_is_written(monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    for name in LOGS:
        with pytest.raises(ba.InputError, match=rf"--logger {name} needs {name}: pip install 'bilevel-at\[{name}\]'"):
            run_module.run(["fastat", *SHORT, "--out", "out", "--logger", name])
    assert not Path("out").exists()


def test_extras_are_declared():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, log in LOGS.items():
        assert f'\n{name} = ["{log.package}"]' in project


def test_nothing_is_imported_unless_asked_for():
    code = "import sys, bilevel_at.commands.run; print({'tensorboard', 'wandb'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "set()\n", done


def test_several_fail_apart(tmp_path):
    said = []
    both = Logs(["tensorboard", "wandb", "wandb"], said.append)
    assert both.names == ("tensorboard", "wandb")

    class Fine(Kept):
        heard: list = []  # noqa: RUF012

    class Broken(Kept):
        fails_at = (1,)
        heard: list = []  # noqa: RUF012

    both._open = {"tensorboard": Broken(None, {}), "wandb": Fine(None, {})}
    both.follow([{"epoch": 1, "loss": 0.5, "nan": float("nan"), "attack": "pgd"}])
    assert len(said) == 1 and "--logger tensorboard" in said[0] and "\n" not in said[0]
    assert Fine.heard == [("epoch", 1, {"loss": 0.5})]


def events(folder="out"):
    """(tag, step, value) of all scalars in the event files, doubled ones included."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    return [
        (value.tag, event.step, make_ndarray(value.tensor).item())
        for file in sorted(Path(folder, "tensorboard").glob("events*"))
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if not value.tag.startswith("config")
    ]


def test_tensorboard_has_every_epoch_once(monkeypatch):
    pytest.importorskip("tensorboard", reason=TENSORBOARD)
    honest = logs.TensorBoard.epoch

    def stopped(self, number, values):
        if number == 2:
            raise KeyboardInterrupt
        honest(self, number, values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(logs.TensorBoard, "epoch", stopped)
        run_module.run(["fastat", *THREE, "--out", "out", "--logger", "tensorboard"])
    run("fastat", *THREE, "--out", "out", "--logger", "tensorboard", "--resume")
    run("fastat", *THREE, "--out", "out", "--logger", "tensorboard", "--resume")  # finished: nothing is logged again
    found = events()
    assert len({(tag, step) for tag, step, _ in found}) == len(found)
    for line in metrics():
        here = {tag: value for tag, step, value in found if step == line["epoch"]}
        for name in ("loss", "clean", "robust", "lr"):
            assert here[name] == pytest.approx(line[name], rel=1e-6)
    results = json.loads(Path("out/results.json").read_text())
    tests = {tag: value for tag, _, value in found if tag.startswith("test/")}
    assert tests["test/last/pgd-2-1"] == pytest.approx(results["last"]["pgd-2-1"]["accuracy"])


@pytest.mark.slow
def test_of_several_processes_the_first_logs():
    pytest.importorskip("tensorboard", reason=TENSORBOARD)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "bilevel_at.run", "fastat", *SHORT, "--out", "out", "--logger", "tensorboard"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(list(Path("out/tensorboard").iterdir())) == 1
    assert [step for tag, step, _ in events() if tag == "loss"] == [1]


def records(path):
    """The records of a .wandb file, which is a LevelDB log after seven bytes: blocks of 32 KiB, of parts of records."""
    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32_768 - place % 32_768) < 7:  # no part begins in the last bytes of a block
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def offline(folder="out"):
    """(id, step, loss) of what offline runs hold, in order."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(Path(folder, "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
                if "loss" in row:
                    rows.append((file.stem.removeprefix("run-"), record.history.step.num, row["loss"]))
    return rows


def test_wandb_offline(monkeypatch):
    pytest.importorskip("wandb", reason=WANDB)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(Path("config").resolve()))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(Path("cache").resolve()))
    honest = logs.WandB.epoch

    def stopped(self, number, values):
        if number == 3:
            raise KeyboardInterrupt
        honest(self, number, values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(logs.WandB, "epoch", stopped)
        run_module.run(["fastat", *THREE, "--out", "out", "--logger", "wandb"])
    state = json.loads(Path("out/wandb-log.json").read_text())
    assert state["epochs"] == 2
    run("fastat", *THREE, "--out", "out", "--logger", "wandb", "--resume")
    assert json.loads(Path("out/wandb-log.json").read_text()) == {"id": state["id"], "epochs": 3}
    expected = [(state["id"], line["epoch"], pytest.approx(line["loss"])) for line in metrics()]
    assert offline() == expected


def test_wandb_that_cannot_begin_does_not_lose_the_run(monkeypatch, capsys):
    wandb = pytest.importorskip("wandb", reason=WANDB)

    def broken(**settings):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", broken)
    run("fastat", *SHORT, "--out", "out", "--logger", "wandb")
    assert (
        "--logger wandb has stopped, and the run goes on (UsageError: No API key configured. Use"
        in capsys.readouterr().out
    )
    assert len(metrics()) == 1
