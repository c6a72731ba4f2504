"""Signals, --resume auto, --save-every, settings that a run was begun without, and errors in a line of their place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from preempting import differences, left_by
from running import SHORT, complaint, run, unchecked

from bilevel_at import run as run_module
from bilevel_at.commands import flags
from bilevel_at.commands.mistakes import is_out_of_memory, one_line
from bilevel_at.commands.saving import Saver
from bilevel_at.commands.signals import Signals, Stopped
from bilevel_at.train import Trainer

pytestmark = pytest.mark.usefixtures("elsewhere")
NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture
def handlers():
    """Of a process in the foreground; they must be the same afterwards."""
    mine = {number: signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL for number in NUMBERS}
    before = {number: signal.signal(number, handler) for number, handler in mine.items()}
    yield
    found = {number: signal.signal(number, before[number]) for number in NUMBERS}
    assert found == mine


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n.name)
def test_a_signal_waits_for_the_step_and_raises_elsewhere(handlers, number):
    signals = Signals()
    with signals.heeded():
        with pytest.raises(Stopped) as stop:
            signal.raise_signal(number)
        assert stop.value.number == number and isinstance(stop.value, KeyboardInterrupt)
        signals.asked = None
        with pytest.raises(Stopped), signals.waiting():
            signal.raise_signal(number)
            assert signals.asked == number
        signals.asked = None
        with signals.waiting():
            pass


def test_a_second_ctrl_c_leaves_at_once(handlers):
    signals, reached = Signals(), []
    with signals.heeded(), pytest.raises(Stopped), signals.waiting():
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")
    assert reached == ["after the first"]


def test_a_signal_that_is_ignored_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with Signals().heeded():
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_another_thread_has_no_handlers(handlers):
    before = {number: signal.getsignal(number) for number in NUMBERS}

    def inside():
        with Signals().heeded():
            found.update({number: signal.getsignal(number) for number in NUMBERS})

    found = {}
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == before


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n.name)
def test_the_command_s_status_is_128_and_the_signal(handlers, monkeypatch, capsys, number):
    def command(args):
        with Signals().heeded():
            signal.raise_signal(number)

    monkeypatch.setattr(sys, "argv", ["run"])
    assert flags.main(command, "run") == 128 + number
    assert capsys.readouterr().err == "run: stopped\n"


def stop_at(call, monkeypatch, number=signal.SIGTERM):
    """A signal comes in the ``call``-th pause between updates."""
    asked, count = Saver.__call__, [0]

    def counted(self):
        count[0] += 1
        if count[0] == call:
            signal.raise_signal(number)
        asked(self)

    monkeypatch.setattr(Saver, "__call__", counted)


ARGS = ["problems/fastbat.py", "--batch-size", "25", "--epochs", "2", *SHORT[2:]]


@pytest.mark.parametrize("call", [1, 3, 4, 5, 7, 9])
def test_a_requeued_job_is_one_command(handlers, monkeypatch, call):
    """4 updates an epoch, and then 3 batches of held-out images: clean, and clean and attacked."""
    run(*ARGS, "--out", "whole", "--resume", "auto")
    with monkeypatch.context() as patch:
        stop_at(call, patch)
        with pytest.raises(Stopped) as stop:
            run_module.run([*ARGS, "--out", "out", "--resume", "auto"])
    updates = min((call - 1) % 7 + 1, 4)
    assert str(stop.value) == (
        f"{(call - 1) // 7} of 2 epochs and {updates} of the 4 updates of the next are in out; the same command goes on"
    )
    state = torch.load("out/midway.pt", weights_only=True)
    assert state["epochs"] == (call - 1) // 7 and state["position"]["updates"] == updates
    run(*ARGS, "--out", "out", "--resume", "auto")
    assert differences(left_by("out"), left_by("whole")) == [] and not Path("out/midway.pt").exists()
    run(*ARGS, "--out", "out", "--resume", "auto")  # nothing is left to do
    assert differences(left_by("out"), left_by("whole")) == []


def test_without_out_too(handlers, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Stopped, match="are in runs/fastbat-digits-seed0; the same command goes on"):
            run_module.run([*ARGS, "--resume", "auto"])
    run(*ARGS, "--resume", "auto")
    assert [path.name for path in Path("runs").iterdir()] == ["fastbat-digits-seed0"]


def test_resume_by_itself_needs_a_run():
    assert "no run to resume in nowhere; --resume auto would begin one" in complaint(
        *ARGS, "--out", "nowhere", "--resume"
    )
    assert "'perhaps' is one argument too many" in complaint(*ARGS, "--resume", "perhaps")


def test_a_position_of_an_epoch_that_has_ended_since_is_passed_over(handlers, monkeypatch):
    """A kill between the two files."""
    run(*ARGS, "--out", "whole")
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(Stopped):
            run_module.run([*ARGS, "--out", "out"])
    early = Path("out/midway.pt").read_bytes()
    with monkeypatch.context() as patch:
        stop_at(6, patch)  # in the second epoch: 1 update and 3 batches were left of the first
        with pytest.raises(Stopped):
            run_module.run([*ARGS, "--out", "out", "--resume"])
    Path("out/midway.pt").write_bytes(early)
    run(*ARGS, "--out", "out", "--resume")
    assert differences(left_by("out"), left_by("whole")) == []


def test_checkpoints_by_time(monkeypatch):
    saved = []
    monkeypatch.setattr(Saver, "save", lambda self: saved.append(self.trainer.position.updates))
    run(*ARGS, "--out", "never", "--save-every", "0")
    assert saved == []
    run(*ARGS, "--out", "always", "--save-every", "1e-9")
    assert saved == [1, 2, 3, 4, 4, 4, 4] * 2
    assert "save_every" not in json.loads(Path("always/config.json").read_text())["options"]


def test_a_run_from_before_there_was_a_setting_goes_on_with_its_default():
    run(*ARGS, "--out", "out")
    config = json.loads(Path("out/config.json").read_text())
    for section, name in (("options", "ema"), ("problem", "mode"), ("solver", "cross_at")):
        del config[section][name]
    unchecked("out")
    Path("out/config.json").write_text(json.dumps(config))
    run(*ARGS, "--out", "out", "--resume")
    line = complaint(*ARGS, "--out", "out", "--resume", "--ema", "0.9")
    assert "out was started with ema = 0.0, and is resumed with 0.9" in line


OWN = """
import torch
from bilevel_at.problems.fastat import problem
class Net(torch.nn.Linear):
    count = 0
    def forward(self, x):
        self.count += self.training
        return self.fail(x) if self.count > 5 else super().forward(x.flatten(1))
    def fail(self, x):
        {what}
def model(shape, classes):
    return Net(64, classes)
"""


def of_main(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["run", *args])
    status = flags.main(run_module.run, "run")
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("return {}['nothing']", "run: KeyError: 'nothing' [mine.py, line 10, in fail; --traceback shows"),
        ("raise MemoryError", "run: out of memory; a smaller --batch-size, or --accumulate, needs less (MemoryError)"),
        ("return torch.empty(10**15)", "run: out of memory; a smaller --batch-size"),
        ("return x.reshape(7, -1)", "run: RuntimeError: "),
    ],
)
def test_errors_in_a_user_s_own_code_name_the_place(monkeypatch, capsys, what, says):
    Path("mine.py").write_text(OWN.format(what=what))
    args = ["mine.py", *ARGS[1:], "--out", "out"]
    status, said = of_main(monkeypatch, capsys, *args)
    assert status == 1 and len(said.splitlines()) == 1 and says in said and "mine.py, line 10, in fail" in said
    status, said = of_main(monkeypatch, capsys, *args, "--resume", "--traceback")
    assert status == 1 and said.startswith("Traceback (most recent call last)") and says in said.splitlines()[-1]


def test_a_traceback_of_a_mistake_is_shown_when_asked_for(monkeypatch, capsys):
    Path("mine.py").write_text("def problem():\n    return 1 / 0\n")
    status, said = of_main(monkeypatch, capsys, "mine.py")
    assert status == 2 and said.splitlines() == [
        "run: mine.py, line 2: problem(...) failed: ZeroDivisionError: division by zero"
    ]
    status, said = of_main(monkeypatch, capsys, "mine.py", "--traceback")
    assert status == 2 and "return 1 / 0" in said


def test_places():
    try:
        Trainer(None, None, None, None, None, None, None, precision="half")
    except ValueError as error:
        assert "trainer.py, line" in one_line(error) and "in __init__" in one_line(error)
    assert "no place is known" in one_line(ValueError("x"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and not is_out_of_memory(RuntimeError("x"))


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n.name)
def test_workers_leave_the_signal_to_their_parent(number, tmp_path):
    """A signal to all processes of a job, while two workers decode: the parent gets the batch that it waits for."""
    source = """
        import os, signal, sys, torch
        from pathlib import Path
        import numpy as np
        from bilevel_at.data.stream import Files
        from bilevel_at.commands.signals import Signals
        class Slow(Files):
            def image(self, position):
                import time
                time.sleep(0.05)
                return np.zeros((3, 2, 2), np.uint8)
        signals = Signals()
        with signals.heeded(), signals.waiting():
            files = Slow(Path("."), np.array([b"x"] * 400), None)
            for i, batch in enumerate(files.batches([[j] for j in range(400)], 2)):
                print(i, flush=True)
                if signals.asked is not None:
                    print("saved", flush=True)
                    break
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in NUMBERS],
    )
    assert process.stdout.readline() == "0\n"
    began = time.monotonic()
    os.killpg(process.pid, number)
    shown, said = process.communicate(timeout=60)
    assert shown.splitlines()[-1] == "saved"
    assert "Stopped" in said.splitlines()[-1] and "DataLoader worker" not in said
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left
