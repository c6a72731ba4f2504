"""Evaluation, its checks and the diagnostics on two and four processes: image by image what one process finds."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import evaluating_together as program
import pytest
import torch
from evaluating_together import EPS, IMAGES, LONG, attack_from_name, directory, record
from ranks import ONLY_LINUX, outcomes, start

from bilevel_at.commands.evaluate import command
from bilevel_at.evaluate.robust import attacked

pytestmark = ONLY_LINUX


def on_processes(folder, count, what="main"):
    """(output, errors, exit status) of each process; they find each other by a file, once for each command."""
    return outcomes(start(count, program.__file__, what, folder / f"meeting-{count}", folder))


@pytest.fixture(scope="module")
def folder(robust, tmp_path_factory):
    """The results of one, two and four processes."""
    folder = tmp_path_factory.mktemp("together")
    torch.save(robust.state_dict(), folder / "weights.pt")
    four = on_processes(folder, 4)  # the second of them kills itself in the end
    assert four[1][2] == -signal.SIGKILL, four[1][1][-3000:]
    assert all(code for *_, code in four) and all("Error" in errors for _, errors, _ in four[:1] + four[2:])
    shutil.copytree(folder / "interrupted", folder / "interrupted-2")
    two = on_processes(folder, 2)
    assert [code for *_, code in two] == [0, 0], two[0][1][-3000:] + two[1][1][-3000:]
    return folder


def results(folder, count):
    return [torch.load(folder / f"result-{count}-{rank}.pt", weights_only=False) for rank in range(count)]


@pytest.mark.filterwarnings("ignore::bilevel_at.evaluate.EvaluationWarning")
def test_every_process_has_what_one_finds(robust, folder):
    *alone, told = program.attacks(robust)
    assert set(alone[4]["autoattack"]["broken"]) == {-1, 0, 1, 2}
    for count in (2, 4):
        for result in results(folder, count):
            *together, rounds = result["attacks"]
            assert together == alone
            assert told / count <= rounds < told


@pytest.mark.parametrize("count", [2, 4])
def test_diagnostics(robust, folder, count):
    alone = program.diagnostics(robust)
    assert all(result["diagnostics"] == alone for result in results(folder, count))


def test_a_directory_is_that_of_one_process(robust, folder):
    *alone, _ = program.stored(robust, folder / "stored-1")
    kept = directory(folder / "stored-1")
    assert {"clean.npz", "pgd-5-2.npz", "autoattack.npz"} <= kept.keys()
    for count in (2, 4):
        assert directory(folder / f"stored-{count}") == kept
        found = [result["stored"] for result in results(folder, count)]
        assert all(one == found[0] for one in found) and list(found[0][:-1]) == alone


@pytest.mark.parametrize("count", [2, 4])
def test_an_error_of_one_process_ends_all(robust, folder, count):
    alone = program.mistakes(robust)
    said = [result["mistakes"] for result in results(folder, count)]
    nan, no_draws, other_data, unknown = zip(*said, strict=True)
    assert alone[0].startswith("BilevelError: the network's logits are not finite on 1 of 8 clean images")
    assert nan == tuple(alone[0] if rank == 1 else f"Elsewhere: {alone[0]}" for rank in range(count))
    assert no_draws == (alone[1],) * count and "InputError" in alone[1]  # which all have
    assert "is not the same on all" in other_data[0] and other_data[0].startswith("InputError")
    assert all(message.startswith("Elsewhere") for message in other_data[1:]) and alone[2] is None
    assert unknown == (alone[3],) * count


def test_interrupted_on_four_and_gone_on_with_two_and_one(robust, folder):
    """One of four is killed inside a stage: the first saves what is done, and the others end."""
    left = program.store(robust, folder / "interrupted")
    trace = left._read(left._file(LONG), attack_from_name(LONG, EPS))
    assert (
        (trace.stage, trace.batch) >= (1, 0) and trace.stage < 4 and not (folder / "interrupted/results.json").exists()
    )
    unbroken = record(attacked(robust, IMAGES, attack_from_name(LONG, EPS), seed=5, batch_size=program.BATCH))
    assert all(result["gone on"] == unbroken for result in results(folder, 2))
    assert record(program.go_on(robust, folder / "interrupted")) == unbroken


def test_the_command(run_here, elsewhere):
    """The first process reads, writes and prints, and an error is one line, of the process that has it."""
    shutil.copytree("run", "alone")
    assert command(["alone", *program.COMMANDS["evaluated"][1:]]) == 0
    first, second = on_processes(elsewhere, 2, "commands")
    assert (first[2], second[2]) == (0, 0), first[1] + second[1]
    assert directory("run") == directory("alone") and not list(Path("run").glob(".lock"))
    assert "accuracy under attack" in first[0] and "worst case of all" in first[0] and not second[0]
    causes = ["attack 'pgd-0' is not known", "elsewhere does not exist", "logits are not finite on 1 of 8 clean images"]
    assert [first[1].count(cause) for cause in causes] == [1, 1, 0]
    assert [second[1].count(cause) for cause in causes] == [0, 0, 1]
    assert len(second[1].splitlines()) == 1 + len(program.COMMANDS)  # beside the exit statuses
    assert "Traceback" not in first[1] + second[1]
