"""Jobs of several processes that are stopped and killed, and go on with as many, or with others."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import ONLY_LINUX, outcomes, printed, start
from running import ROOT, run
from test_ranks_training import PROGRAM

pytestmark = [ONLY_LINUX, pytest.mark.slow]

STOP = (
    PROGRAM.split("SETTINGS = ")[0]
    + '''
class Leave(Exception):
    """As a signal: raised between two updates."""


what, name, call, file = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
dist.init_process_group("gloo")
with ba.distributed.together():
    trainer = trained(name)
    if what == "stop":
        calls = []

        def between():
            calls.append(1)
            if len(calls) == call:
                state = trainer.state_dict()
                if shares.rank() == 0:
                    torch.save({"state": state, "history": trainer.recorder.arrays()}, file)
                raise Leave

        trainer.between = between
        try:
            list(trainer.epochs())
        except Leave:
            pass
    else:
        saved = torch.load(file, weights_only=False)
        trainer.load_state_dict(saved["state"])
        if trainer.done:
            trainer.recorder.restore(saved["history"], trainer.done)
        before = trainer.done
        state, records = end(trainer)
if what == "go on" and dist.get_rank() == 0:
    its_state, its_records = end(trained(name))  # alone, unbroken
    gap = apart(its_state, state)
    history = apart(its_records[EPOCHS:], records[EPOCHS - before:])
    assert gap < 1e-10 and history < 1e-6, (gap, history)
    assert apart(its_records[before:EPOCHS], records[:EPOCHS - before]) < 1e-6
    print(f"{name}: {gap:.1e} from one unbroken process", flush=True)
dist.barrier()
dist.destroy_process_group()
'''
)


STOPS = [("atas", 4, 4, 2), ("free", 10, 2, 4), ("remembered_fastbat", 9, 4, 1)]


@pytest.mark.parametrize("name, call, first, then", STOPS)
def test_a_state_inside_an_epoch_goes_on_with_another_number_of_processes(tmp_path, name, call, first, then):
    for what, count in (("stop", first), ("go on", then)):
        results = printed(tmp_path, count, STOP, what, name, call, tmp_path / "state.pt")
    assert "from one unbroken process" in results[0]


COMMON = ["--epochs", "3", "--examples", "400", "--test-examples", "60", "--attacks", "clean", "pgd-2-1"]
COMMON += ["--select", "pgd-2-1", "--save-every", "0.0001"]


def command(count, problem, *more):
    return start(count, "-m", "bilevel_at.run", ROOT / "problems" / f"{problem}.py", *COMMON, *more)


def wait_for(path, jobs, longest=60.0):
    end = time.monotonic() + longest
    while not path.exists():
        assert time.monotonic() < end, "nothing was saved"
        assert all(job.poll() is None for job in jobs), [job.communicate() for job in jobs if job.poll() is not None]
        time.sleep(0.01)


def files(run_dir):
    """All that a run leaves, but for times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    untimed = [{k: v for k, v in line.items() if k not in ("seconds", "train_seconds", "memory")} for line in lines]
    last = torch.load(run_dir / "last.pt", weights_only=False)
    with np.load(run_dir / "history.npz") as arrays:
        history = {name: arrays[name] for name in arrays}
    memories = sorted(path.name for path in run_dir.glob("memory-last-*.pt"))
    return untimed, last["model"], history, memories


def assert_same(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    assert all(np.array_equal(value, other[2][name], equal_nan=True) for name, value in one[2].items())
    assert one[3] == other[3]


@pytest.mark.parametrize("problem", ["atas", "fastbat"])
def test_a_signal_stops_all_and_the_job_goes_on_bit_for_bit(tmp_path, problem, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [code for *_, code in outcomes(command(2, problem, "--out", "unbroken"))] == [0, 0]
    jobs = command(2, problem, "--out", "stopped")
    wait_for(Path("stopped/midway.pt"), jobs)
    jobs[1].send_signal(signal.SIGTERM)  # to one of them alone
    results = outcomes(jobs)
    assert [code for *_, code in results] == [143, 143], results
    assert "the same command with --resume goes on" in results[0][1] and results[0][1].count("\n") == 1
    assert results[1][:2] == ("", "")
    assert Path("stopped/midway.pt").exists()
    results = outcomes(command(2, problem, "--out", "stopped", "--resume"))
    assert [code for *_, code in results] == [0, 0], results
    assert_same(files(Path("unbroken")), files(Path("stopped")))


def test_a_process_that_is_killed_ends_the_job_and_two_go_on_with_what_four_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(ROOT / "problems/atas.py", *COMMON, "--out", "one")
    jobs = command(4, "atas", "--out", "four")
    wait_for(Path("four/midway.pt"), jobs)
    jobs[2].kill()
    results = outcomes(jobs, 60)
    codes = [code for *_, code in results]
    assert codes[2] == -signal.SIGKILL and all(code not in (0, None) for code in codes), results
    assert results[0][1] == "bilevel_at.run: another process of this job has ended\n"
    assert results[1][1] == results[3][1] == ""
    results = outcomes(command(2, "atas", "--out", "four", "--resume"))
    assert [code for *_, code in results] == [0, 0], results
    (lines, weights, history, _), (its_lines, its_weights, its_history, _) = files(Path("one")), files(Path("four"))
    assert [line["robust"] for line in lines] == pytest.approx([line["robust"] for line in its_lines], abs=0.1)
    gap = max(float((value - its_weights[name]).abs().max()) for name, value in weights.items())
    print(f"4 processes, a kill, 2 processes: weights {gap:.1e} from one process (float32)")
    assert gap < 1e-3
    assert np.array_equal(np.isnan(history["step"]), np.isnan(its_history["step"]))


BROKEN = """
import torch

import bilevel_at as ba
from bilevel_at.runs.recipe import DIGITS


class Broken(ba.UpperProblem):
    def loss_at(self, model, batch, solution, generator=None):
        losses = super().loss_at(model, batch, solution, generator)
        return torch.where(batch.index == 7, torch.nan, losses) if batch.examples else losses


def problem(epsilon: float = 0.2) -> ba.BilevelProblem:
    return ba.BilevelProblem(Broken(), ba.AtAnchor(ba.LinfBall(epsilon)))


def recipe():
    return {"digits": DIGITS}
"""


def test_what_is_not_finite_on_one_process_ends_all_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(BROKEN)
    results = outcomes(start(2, "-m", "bilevel_at.run", "mine.py", *COMMON, "--out", "run"), 60)
    errors = [error for _, error, _ in results]
    assert all(code not in (0, None) for *_, code in results), results
    told = [error for error in errors if "the loss is nan in step" in error]
    assert told and all("on the training examples 7" in error for error in told), errors
    assert all(error.count("\n") <= 1 for error in errors), errors
    results = outcomes(start(2, "-m", "bilevel_at.run", "mine.py", *COMMON, "--out", "skipping", "--skip-nonfinite"))
    assert [code for *_, code in results] == [0, 0], results
    assert sum(line["skipped"] for line in files(Path("skipping"))[0]) == 3
