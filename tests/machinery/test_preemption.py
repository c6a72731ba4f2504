"""A run that is stopped anywhere goes on to the same bits: inside an epoch, in mid-replay, in the held-out attack."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from marks import fast
from preempting import differences, finished, left_by, small_trainer, stopped_at, through_a_file, untimed
from running import PROBLEMS

from bilevel_at import run as run_module
from bilevel_at.commands.flags import main
from bilevel_at.commands.plan import PROG
from bilevel_at.models import build_model
from bilevel_at.solvers import HessianFreeKKT, Lazy


def assert_goes_on(make, calls):
    """Every stop is compared with the unbroken run: weights, averages, optimiser, memories, metrics, history."""
    whole = make()
    lines, history = finished(whole)
    end = whole.state_dict()
    done = 0
    for call in calls:
        state, before, written = stopped_at(make(), call)
        if state is None:
            break
        again = make()
        again.load_state_dict(state)
        again.recorder.restore(written, again.done)
        after, arrays = finished(again)
        assert untimed([*before, *after]) == untimed(lines), call
        assert differences(arrays, history) == [], call
        assert differences(again.state_dict(), end) == [], call
        done += 1
    return done


@pytest.mark.parametrize("name", fast(PROBLEMS, ["fastbat", "atas", "free", "fgsm_sdi", "awp", "subat"]))
def test_a_run_stopped_between_any_two_updates_is_the_unbroken_one(name):
    """4 updates an epoch (12 of Free-AT's), 3 batches of held-out attacks: stops 1, 3, … in all of them."""
    stops = assert_goes_on(lambda: small_trainer(name), range(1, 26, 3))
    assert stops >= 6
    print(f"{name}: {stops} stops")


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"ema": 0.9},
        {"average_from": 2, "reestimate": True},
        {"schedule": "one-cycle", "epsilon_warmup": 0},
        {"solver": lambda: Lazy(HessianFreeKKT(), 0.5)},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_every_part_of_the_recipe_is_in_the_position(changes):
    def make():
        own = dict(changes)
        solver = own.pop("solver", lambda: None)()
        return small_trainer("fastbat", solver=solver, **own)

    assert assert_goes_on(make, (1, 2, 6, 9, 13)) == 5


class Dropping(torch.nn.Sequential):
    """A network that draws at random itself."""

    def __init__(self):
        layers = [torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3)]
        super().__init__(*layers)


def test_dropout_goes_on_where_it_was():
    """The global generator is not at the epoch's beginning any more."""

    def make():
        torch.manual_seed(1)
        return small_trainer("fastat", model=Dropping())

    assert assert_goes_on(make, (1, 2, 5, 8)) == 4
    state, _, _ = stopped_at(make(), 2)
    state["position"]["random"][1] = torch.Generator().manual_seed(5).get_state()
    other = make()
    other.load_state_dict(state)
    lines, _ = finished(other)
    assert untimed(lines) != untimed(finished(make())[0])  # the test would notice


def test_a_position_without_its_sums_or_draws_would_be_noticed():
    for spoil in ("means", "looks", "random"):
        make = lambda: small_trainer("fastat")  # noqa: E731
        state, _, _ = stopped_at(make(), 2)
        part = state["position"][spoil]
        if spoil == "random":
            part[0] = torch.Generator().manual_seed(5).get_state()
        else:
            part.add_(1)
        again = make()
        again.load_state_dict(state)
        assert untimed(finished(again)[0]) != untimed(finished(make())[0]), spoil


def test_a_state_between_epochs_is_as_before():
    trainer = small_trainer("fastat")
    next(trainer.epochs())
    state = through_a_file(trainer.state_dict())
    assert state["epochs"] == 1 and "position" not in state


KILLED = {
    "fastbat": ["problems/fastbat.py", "--epochs", "6"],
    "atas": ["problems/atas.py", "--epochs", "8", "--augment", "crop-flip"],
    "free": ["problems/free.py", "--epochs", "4", "--replays", "5"],
    "fgsm_sdi": ["problems/fgsm_sdi.py", "--epochs", "5"],
    "awp": ["problems/awp.py", "--of", "fastat", "--epochs", "6", "--ema", "0.9"],
}
FEW = ["--examples", "400", "--batch-size", "20", "--attacks", "clean", "pgd-2-1", "--select", "pgd-5-1"]
FEW += ["--test-examples", "40", "--device", "cpu", "--save-every", "0.0005"]
STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def command(words):
    """In a process of its own: the command, with signals as in a terminal, and what it prints in files."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for name in ("stdout", "stderr"):
        file = open(f"{name}.txt", "w")  # noqa: SIM115
        os.dup2(file.fileno(), getattr(sys, f"__{name}__").fileno())
        setattr(sys, name, file)
    sys.argv = ["run", *words]
    status = main(run_module.run, PROG)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def start(name, out, *more):
    """A process forked from this one, which has imported everything: a process that does so takes four seconds."""
    words = [*KILLED[name], *FEW, "--out", out, *more]
    process = multiprocessing.get_context("fork").Process(target=command, args=(words,))
    process.start()
    return process


def ended(process, status=0):
    """What it has said on standard error."""
    process.join(300)
    said = Path("stderr.txt").read_text()
    assert process.exitcode == status, said
    assert "Traceback" not in said
    return said


def saved_at(out):
    """When the position inside an epoch was last written, or the last epoch was."""
    files = [Path(out, name) for name in ("midway.pt", "last.pt")]
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)


def trained_for(process, out, seconds):
    """Wait until the process has trained for so long; whether it still goes on."""
    before = saved_at(out)
    while saved_at(out) == before and process.is_alive():
        time.sleep(0.005)
    time.sleep(seconds)
    return process.is_alive()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What an unbroken run of each method leaves, and how long it trains."""
    made = {}

    def of(name):
        if name not in made:
            out = str(tmp_path_factory.mktemp(name) / "whole")
            process = start(name, out)
            trained_for(process, out, 0)
            began = time.monotonic()
            ended(process)
            made[name] = left_by(out), time.monotonic() - began
        return made[name]

    return of


def killed_again_and_again(name, number, kills, seconds, whole, draw):
    """Kill runs at random moments and resume them, until there were ``kills``; whether each was inside an epoch."""
    hits, runs = [], 1
    while runs <= 2 * kills:
        out = f"out{runs}"
        process = start(name, out, "--resume", "auto")
        if len(hits) < kills and trained_for(process, out, draw.uniform(0, seconds)):
            os.kill(process.pid, number)
        process.join(300)
        if process.exitcode == 0:  # after all kills, or because it was quicker than one
            assert differences(left_by(out), whole) == [], (name, number, hits)
            if len(hits) == kills:
                return hits
            runs += 1
            continue
        said = ended(process, STATUS[number])
        if number != signal.SIGKILL:
            pattern = rf"bilevel_at.run: stopped: \d+ of \d epochs.* are in {out}; the same command goes on\n"
            assert re.fullmatch(pattern, said), said
        hits.append(Path(out, "midway.pt").exists())
    return hits


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_random_moments(name, number, unbroken):
    """5 methods, 4 signals, 3 kills: 60 in all."""
    whole, seconds = unbroken(name)
    hits = killed_again_and_again(name, number, 3, seconds / 4, whole, random.Random(f"{name} {number}"))
    print(f"{name}, {number.name}: {len(hits)} kills, {sum(hits)} inside an epoch; all resumed to the same bits")
    assert len(hits) == 3


@pytest.mark.usefixtures("elsewhere")
def test_a_job_that_is_terminated_goes_on(unbroken):
    """18 batches of 20, 5 replays each."""
    whole, _ = unbroken("free")
    process = start("free", "out", "--resume", "auto")
    assert trained_for(process, "out", 0)
    os.kill(process.pid, signal.SIGTERM)
    (line,) = ended(process, 143).splitlines()
    pattern = r"bilevel_at.run: stopped: \d of 4 epochs and \d+ of the 90 updates of the next are in out; "
    assert re.fullmatch(pattern + "the same command goes on", line), line
    ended(start("free", "out", "--resume", "auto"))
    assert differences(left_by("out"), whole) == [] and not Path("out/midway.pt").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["fastbat", "atas", "free", "fgsm_sdi"])
def test_on_a_gpu_too(name, monkeypatch):
    """With torch's deterministic algorithms; the caller's generator of the GPU is left alone."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    images = small_trainer(name).loader.images.to("cuda")

    def make():
        torch.manual_seed(0)
        return small_trainer(name, images=images, model=build_model("small_cnn", (1, 8, 8), 3).cuda())

    trainer = make()
    before = torch.cuda.get_rng_state()
    finished(trainer)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert assert_goes_on(make, (1, 2, 6, 9)) == 4
