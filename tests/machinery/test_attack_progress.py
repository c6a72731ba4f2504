"""Attacks show how many images are done and when they may end; on no terminal, in a line now and then."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest
import torch
from evaluating_runs import evaluate
from rich.console import Console
from torch import nn

from bilevel_at.batch import Batch
from bilevel_at.commands import attacking
from bilevel_at.commands.attacking import AttackBars, Pace, remaining
from bilevel_at.data import Images
from bilevel_at.evaluate import Attack, attack_from_name
from bilevel_at.evaluate.robust import Trace
from bilevel_at.evaluate.stages import passes
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.evaluations import Store


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def pace_of(attack, images=1000, batch_size=100):
    clock, trace = Clock(), Trace.start(images)
    return clock, trace, Pace(attack, trace, classes=10, batch_size=batch_size, clock=clock)


def test_time_left_is_what_the_rest_takes_at_the_rate_so_far():
    clock, trace, pace = pace_of(attack_from_name("pgd-50-4", 0.1))
    assert pace.seconds_left != pace.seconds_left  # nothing is known yet
    trace.broken[:200] = 0  # misclassified as they are
    trace.stage, trace.batch = 1, 0
    pace.tick(0)
    assert str(pace).startswith("0/800 images  start 1 of 4  80.0% standing")
    for _ in range(25):  # half of a batch's gradients, 10 s
        clock.now += 0.4
        pace.tick(100)
    # Four starts on 800 images at half a batch of 100 in 10 s; that batch's half is done.
    assert pace.seconds_left == pytest.approx(4 * 8 * 20 - 10)
    clock.now = 20.0
    trace.batch = 1
    pace.see()
    assert pace.done == 100 and pace.seconds_left == pytest.approx(4 * 8 * 20 - 20)
    trace.broken[200:250] = 1  # half of that batch: so few are expected to reach the later starts
    pace.see()
    assert pace.seconds_left == pytest.approx(7 * 20 + 3 * 4 * 20)
    assert "100/800 images  start 1 of 4  75.0% standing  0:06:20 left" in str(pace)
    assert 0 < pace.share < 0.25


def test_an_attack_that_goes_on_counts_its_rate_from_there():
    trace, clock = Trace.start(1000), Clock()
    trace.stage, trace.batch = 1, 5
    pace = Pace(attack_from_name("pgd-10-1", 0.1), trace, 10, 100, clock)
    assert pace.done == 500 and not pace.rate
    clock.now, trace.batch = 7.0, 6
    pace.see()
    assert pace.seconds_left == pytest.approx(4 * 7)


def test_the_last_image_is_the_end():
    clock, trace, pace = pace_of(attack_from_name("pgd-10-1", 0.1))
    trace.stage = 1
    pace.see()
    clock.now, trace.batch = 1.0, 10
    pace.see()
    assert (pace.done, pace.left, pace.seconds_left) == (1000, 0, 0)
    assert pace.share == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["fgsm", "pgd-3-1", "beta-12", "nearest-5-2", "apgd-ce", "apgd-t", "square"])
def test_gradients_that_stages_state_are_about_those_they_take(name):
    """Within a factor of two, of a network that nothing breaks."""
    x = torch.rand(4, 1, 8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with torch.no_grad():
        model[1].bias[0] = 1000.0
    (stage,) = attack_from_name(name, 0.01).stages
    counted = []
    with attacking._counted([model], counted.append):
        stage(model.eval(), Batch(x, torch.zeros(4, dtype=torch.int64)), torch.Generator().manual_seed(0))
    assert 0.5 < sum(counted) / 4 / passes(stage, 5) < 2.01
    assert not model._forward_pre_hooks


def test_a_stage_of_a_users_own_need_not_say():
    class Mine:
        name = "mine"

        def rows(self, classes):
            return 1

    clock, trace, pace = pace_of(Attack("mine", None, [Mine()]))
    assert passes(Mine(), 10) == 1 and pace.images == 1000


def store(tmp_path):
    torch.manual_seed(0)
    images = Images(torch.rand(40, 1, 8, 8), torch.arange(40) % 10, 10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    return Store(RunDir(tmp_path), "best", model, images, usual=0.1, batch_size=8)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_shown_and_what_is_not(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(attacking, "DRAW_EVERY", 0.0)
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    attack = attack_from_name("pgd-5-2", 0.1)
    plain = store(tmp_path / "plain").score(attack)
    with AttackBars(console, line_every=0.0 if not terminal else 60.0) as bars:
        shown = []
        monkeypatch.setattr(bars.progress, "update", lambda task, **fields: shown.append(fields)) if terminal else None
        name, score = bars.score(store(tmp_path / "shown"), attack)
        (tmp_path / "shown").rename(tmp_path / "once")
    assert score.accuracy == plain[1].accuracy  # looking changes nothing
    if terminal:
        lines = [fields["shown"] for fields in shown]
        assert all(0 <= fields["completed"] <= 1 for fields in shown)
    else:
        lines = text.getvalue().splitlines()
        assert all(line.startswith("best: pgd-5-2  ") for line in lines)
    assert any(re.search(r"\d+/40 images  clean", line) for line in lines)
    assert any(re.search(r"\d+/\d+ images  start 1 of 2  \d+\.\d% standing  0:00:0\d left", line) for line in lines)


def test_without_a_terminal_a_short_attack_is_silent(tmp_path):
    text = io.StringIO()
    with AttackBars(Console(file=text)) as bars:
        bars.score(store(tmp_path), attack_from_name("pgd-5-2", 0.1))
    assert text.getvalue() == ""


def test_time():
    assert [remaining(s) for s in (0, 59.6, 3661, float("nan"), float("inf"))] == [
        "0:00:00 left",
        "0:01:00 left",
        "1:01:01 left",
        "",
        "",
    ]


@pytest.mark.usefixtures("run_here")
def test_lines_of_the_evaluate_command_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(attacking, "LINE_EVERY", 0.0)
    monkeypatch.setattr(AttackBars.__init__, "__defaults__", (0.0,))
    evaluate("run", "--attacks", "pgd-20-2", "--which", "last", "--checks", 0, "--examples", 60, "--batch-size", 20)
    assert re.search(r"last: pgd-20-2  \d+/\d+ images  start 1 of 2", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.usefixtures("run_here")
def test_bars_on_a_terminal():
    """The evaluate command on a pseudo-terminal."""
    own, other = pty.openpty()
    args = ["run", "--attacks", "pgd-200-3", "--which", "last", "--checks", "0", "--batch-size", "50"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-m", "bilevel_at.evaluate", *args], stdout=other, stderr=other, env=environment
    )
    os.close(other)
    heard = b""
    while True:
        try:
            part = os.read(own, 4096)
        except OSError:  # the other end is closed
            break
        heard += part
        if not part:
            break
    os.close(own)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", heard.decode())
    assert process.wait() == 0
    assert re.search(r"last: pgd-200-3 .*\d+/\d+ images  start \d of 3  \d+\.\d% standing  0:00:\d\d left", text)
