"""Damaged files of a run are never read in silence: another generation is read, or one line refuses."""

from __future__ import annotations

import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from damaging import EPOCHS, command, content, damage, files_of, flat, flip, go_on, heard, json_of, same, stopped_run
from marks import fast
from running import unchecked

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands import flags
from bilevel_at.commands.evaluate import command as evaluate
from bilevel_at.commands.saving import Saver
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.manifest import before
from bilevel_at.runs.record import read

CURRENT = ["config.json", "manifest.json", "metrics.jsonl", "history.npz", "last.pt", "best.pt"]
EVALUATED = ["results.json", "evaluation/commands.json", "evaluation/last/clean.npz", "evaluation/best/clean.npz"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``whole``: all epochs of ATAS; ``stopped``: all but one, evaluated; ``other``: another seed."""
    folder = tmp_path_factory.mktemp("runs")
    run_module.run(command("atas", folder / "whole"))
    run_module.run(command("atas", folder / "other", "--seed", "1"))
    stopped_run("atas", folder / "stopped", EPOCHS - 1)
    assert evaluate([str(folder / "stopped"), "--attacks", "clean", "--checks", "0"]) == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read_all(out):
    """Every reader of a run."""
    lines = []
    results = {}
    for name, reader in {
        "record": lambda: read(out).results,
        "history": lambda: ba.diagnose.read_history(out),
        "last": lambda: ba.load(out, "last").state_dict(),
        "best": lambda: ba.load(out, "best").state_dict(),
        "evaluate": lambda: evaluate([str(out), "--attacks", "clean", "--checks", "0"]),
    }.items():
        results[name], said = heard(reader)
        lines += said
    return results, lines


def check(runs, name, out):
    """Read and resume a damaged copy. Returns "refused", "fell back", or "not read"."""
    whole, stopped = content(runs / "whole"), runs / "stopped"
    copy = shutil.copytree(out, f"{out}-to-read")
    loaded, lines = read_all(copy)
    _, said = heard(go_on, "atas", out)
    if name != "manifest-before.json":  # which nothing needs as long as manifest.json is whole
        assert said if name in CURRENT else said + lines, f"{name} was read, or made anew, in silence"
    for which in ("last", "best"):
        good = [ba.load(stopped, which).state_dict(), RunDir(stopped).checkpoint(which)["model"]]
        older = RunDir(stopped).path / before(f"{which}.pt")
        good.append(torch.load(older, weights_only=True)["model"])
        assert loaded[which] is None or any(same(dict(loaded[which]), dict(weights)) for weights in good)
    refused = any("delete" in line or "no whole generation" in line for line in said)
    if not refused:
        assert same(content(out), whole), f"{name}: the resumed run is another one: {said}"
    return "refused" if refused else "fell back" if said or lines else "not read"


def memory(out):
    return [path.name for path in Path(out).glob("memory-*.pt")]


def counted(outcomes):
    return ", ".join(f"{outcomes.count(kind)} {kind}" for kind in sorted(set(outcomes)))


@pytest.mark.parametrize("flips", fast([12, 60], [12]))
def test_no_flipped_bit_is_loaded_in_silence(runs, flips, capsys):
    rng, names, outcomes = random.Random(flips), files_of(runs / "stopped"), []
    assert {*CURRENT, *EVALUATED} <= set(names) and len(memory(runs / "stopped")) == 2
    for number in range(flips):
        # Every file in turn; the bit anywhere in it.
        name, out = names[number % len(names)], Path(f"flip-{number}")
        shutil.copytree(runs / "stopped", out)
        flip(out / name, rng.randrange(8 * (out / name).stat().st_size))
        outcomes.append(check(runs, name, out))
    with capsys.disabled():
        print(f"\n{flips} flipped bits in {len(names)} files: {counted(outcomes)}")


@pytest.mark.parametrize("kind", fast(["truncated", "empty", "missing", "foreign"], ["truncated", "foreign"]))
def test_a_file_that_is_not_the_one_that_was_written(runs, kind, capsys):
    outcomes = {}
    for name in ["last.pt", "best.pt", "metrics.jsonl", "history.npz", "manifest.json", "config.json", *EVALUATED[:1]]:
        out = Path(name.replace("/", "-"))
        shutil.copytree(runs / "stopped", out)
        damage(kind, out / name, runs / "other" / name)
        if kind == "missing" and name in ("config.json", "results.json"):
            _, lines = heard(read, out)
            assert lines or name == "results.json"
            continue
        if kind == "foreign" and name == "manifest.json":
            assert heard(read, out)[1]  # whose files these are not
            continue
        outcomes[name] = check(runs, name, out)
    with capsys.disabled():
        print(f"\n{kind}: {outcomes}")
    assert all(outcomes[name] == "fell back" for name in ("last.pt", "best.pt", "metrics.jsonl", "history.npz"))


def test_where_both_generations_are_damaged_nothing_is_started_over(runs):
    shutil.copytree(runs / "stopped", "out")
    for name in ("last.pt", "last-before.pt"):
        flip(Path("out", name), 4000)
    kept = {name: Path("out", name).read_bytes() for name in files_of("out")}
    result, lines = heard(go_on, "atas", "out")
    assert result is None and len(lines) == 1 and "no whole generation" in lines[0] and "last.pt" in lines[0]
    result, lines = heard(ba.load, "out", "last")
    assert result is None and len(lines) == 1 and "last.pt is damaged" in lines[0]
    assert {name: Path("out", name).read_bytes() for name in files_of("out")} == kept


def test_both_manifests_damaged(runs):
    shutil.copytree(runs / "stopped", "out")
    for name in ("manifest.json", "manifest-before.json"):
        flip(Path("out", name), 4000)
    result, lines = heard(go_on, "atas", "out")
    assert result is None and len(lines) == 1 and "manifest.json is damaged" in lines[0]
    unchecked("out")
    assert heard(go_on, "atas", "out") == (0, []) and same(content("out"), content(runs / "whole"))
    assert json_of("out/manifest.json")["generations"]


def test_a_run_without_its_configuration_is_not_started_over(runs):
    shutil.copytree(runs / "stopped", "out")
    Path("out/config.json").unlink()
    result, lines = heard(run_module.run, command("atas", "out"))
    assert result is None and "of a run but no config.json" in lines[0]
    for name in files_of("out"):
        if not name.startswith("manifest"):
            Path("out", name).unlink()
    result, lines = heard(run_module.run, command("atas", "out", "--resume", "auto"))
    assert result is None and lines == ["out has manifest.json of a run but no config.json; choose another --out"]
    assert files_of("out") == ["manifest-before.json", "manifest.json"]
    shutil.rmtree("out")
    shutil.copytree(runs / "stopped", "out")
    unchecked("out")
    for name in ("last.pt", "best.pt"):
        Path("out", name).unlink()
    shutil.copy(runs / "stopped/config.json", "out")
    result, lines = heard(go_on, "atas", "out")
    assert result is None and lines == ["out has metrics of 3 epochs, but no checkpoint; choose another --out"]


def test_a_run_of_the_format_before_goes_on(runs, monkeypatch):
    """One file with the memories in it, and no manifest."""
    shutil.copytree(runs / "stopped", "out")
    state = RunDir("out").checkpoint("last")
    assert {name for name, value in flat_tensors(state["problem"])} and state.pop("memories")
    for path in [*Path("out").glob("memory-*"), *Path("out").glob("*-before.*"), Path("out/manifest.json")]:
        path.unlink()
    torch.save({**state, "format": 2}, "out/last.pt")
    assert heard(go_on, "atas", "out") == (0, [])
    one, other = content("out"), content(runs / "whole")
    assert same(one, other) and len(memory("out")) == 1


def flat_tensors(state):
    return [(path, value) for path, value in flat(state).items() if isinstance(value, torch.Tensor)]


def test_memories_are_apart_and_written_when_they_change(tmp_path):
    run = RunDir(tmp_path)
    remembered = {"problem": {"lower.anchor": {"values": torch.rand(5, 3), "count": 1}}, "solver": {}}
    state = {"model": {"weight": torch.ones(2)}, "epochs": 1, **remembered}
    run.save_checkpoint("last", state)
    (first,) = memory(tmp_path)
    written = (tmp_path / first).stat().st_mtime_ns
    remembered["problem"]["lower.anchor"]["count"] = 2  # no tensor
    run.save_checkpoint("last", {**state, "epochs": 2})
    assert memory(tmp_path) == [first] and (tmp_path / first).stat().st_mtime_ns == written
    for number in range(3, 6):
        remembered["problem"]["lower.anchor"]["values"] = torch.rand(5, 3)
        run.save_checkpoint("last", {**state, "epochs": number})
        assert len(memory(tmp_path)) == 2  # of the two generations that are kept
    stored = torch.load(tmp_path / "last.pt", weights_only=True)
    assert not flat_tensors(stored["problem"]) and stored["memories"] in memory(tmp_path)
    whole = run.checkpoint("last")
    assert torch.equal(whole["problem"]["lower.anchor"]["values"], remembered["problem"]["lower.anchor"]["values"])
    (tmp_path / stored["memories"]).unlink()
    assert "model" in run.checkpoint("last", memories=False)
    with pytest.raises(ba.InputError, match="has no memory-.*, which last.pt needs"):
        run.checkpoint("last")


def test_two_checkpoints_keep_a_memory_each(tmp_path):
    """One inside an epoch, ``midway``, beside ``last``; it goes with its memories."""
    run = RunDir(tmp_path)
    state = {"model": {"w": torch.ones(2)}, "epochs": 1, "solver": {}}

    def save(which, number):
        run.save_checkpoint(which, {**state, "problem": {"anchor": {"values": torch.tensor([float(number)])}}})

    def remembered(which):
        return run.checkpoint(which)["problem"]["anchor"]["values"].item()

    for number, which in enumerate(["last", "midway", "midway", "midway"]):
        save(which, number)
    assert (remembered("last"), remembered("midway")) == (0, 3) and len(memory(tmp_path)) == 3
    flip(tmp_path / "midway.pt", 4000)
    _, lines = heard(run.recover)
    assert len(lines) == 1 and (remembered("last"), remembered("midway")) == (0, 2)
    save("last", 5)
    run.remove_checkpoint("midway")
    assert not run.has_checkpoint("midway") and remembered("last") == 5
    assert len(memory(tmp_path)) == 2 and not list(tmp_path.glob("midway*"))
    flip(tmp_path / "last.pt", 4000)
    assert len(heard(run.recover)[1]) == 1 and remembered("last") == 0


@pytest.mark.parametrize("saves", [1, 2])
def test_the_memories_of_the_last_epoch_are_not_needed_inside_the_next(saves):
    """Both generations have the one file of them, and midway.pt goes on from its own."""
    calls, save = [], Saver.save

    def killed(saver):
        if saver.trainer.done == EPOCHS - 1:
            if len(calls) == saves:
                raise Killed
            calls.append(save(saver))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", killed)
        with pytest.raises(Killed):
            run_module.run(command("atas", "out", "--save-every", "1e-9", "--batch-size", "10"))
    run_module.run(command("atas", "other", "--batch-size", "10"))
    (remembered,) = Path("out").glob("memory-last-*.pt")
    flip(remembered, 8000)
    result, lines = heard(run_module.run, command("atas", "out", "--resume", "--batch-size", "10"))
    assert result == 0 and len(lines) == 1 and f"{remembered.name} damaged or missing; midway.pt is newer" in lines[0]
    assert same(content("out"), content("other"))


def test_a_checkpoint_inside_an_epoch_that_has_ended_is_removed(runs):
    """Killed between the end of the last epoch and the removal: no other epoch's end would remove it."""

    def killed(saver):
        if saver.trainer.done == EPOCHS:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "close_epoch", killed)
        with pytest.raises(Killed):
            run_module.run(command("atas", "out", "--save-every", "1e-9"))
    assert Path("out/midway.pt").exists() and list(Path("out").glob("memory-midway-*"))
    assert heard(go_on, "atas", "out") == (0, [])
    assert not list(Path("out").glob("midway*")) + list(Path("out").glob("memory-midway-*"))
    assert same(content("out"), content(runs / "whole"))


class Killed(BaseException):
    """As SIGKILL, between two updates."""


def test_the_best_checkpoint_has_no_memories(runs):
    for name in ("best.pt", "best-before.pt"):
        assert set(torch.load(runs / "stopped" / name, weights_only=True)) == {"model", "epochs", "format"}


def test_a_save_within_an_epoch_keeps_two_copies_of_what_it_leaves(tmp_path):
    """The checkpoint alone is new; metrics, history and best have two copies, and damage to one loses nothing."""
    run = RunDir(tmp_path)
    for number in (1, 2):
        with run.together():
            run.save_checkpoint("best", {"model": {"w": torch.tensor([float(number)])}, "epochs": number})
            run.write_metrics([{"epoch": n + 1} for n in range(number)])
            run.save_arrays("history.npz", {"step": torch.arange(number).numpy()})
            run.save_checkpoint("last", {"model": {"w": torch.tensor([float(number)])}, "epochs": number})
    for step in (10, 20):
        run.save_checkpoint("last", {"model": {"w": torch.tensor([2.0 + step])}, "epochs": 2, "step": step})
    for name in ("best.pt", "metrics.jsonl", "history.npz"):
        assert (tmp_path / name).read_bytes() == (tmp_path / before(name)).read_bytes()
        flip(tmp_path / name, 200)
    _, lines = heard(run.recover)
    assert len(lines) == 1 and "best.pt, metrics.jsonl, history.npz damaged or missing; restored from" in lines[0]
    assert run.checkpoint("last")["step"] == 20 and run.checkpoint("best")["epochs"] == len(run.metrics()) == 2
    flip(tmp_path / "last.pt", 4000)
    _, lines = heard(run.recover)
    assert len(lines) == 1 and "last.pt damaged or missing; this run goes on from the generation" in lines[0]
    assert run.checkpoint("last")["step"] == 10 and len(run.metrics()) == 2


def test_a_command_says_it_in_one_line(runs, monkeypatch, capsys):
    shutil.copytree(runs / "stopped", "out")
    flip(Path("out/last.pt"), 4000)
    monkeypatch.setattr(sys, "argv", ["evaluate", "out", "--attacks", "clean", "--which", "last", "--checks", "0"])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert flags.main(evaluate, "bilevel_at.evaluate") == 0
    expected = (
        "bilevel_at.evaluate: out/last.pt is damaged or missing; last-before.pt is read, of the generation before"
    )
    assert capsys.readouterr().err.splitlines() == [expected]


def test_a_run_that_has_lost_its_only_epoch_is_not_started_over():
    """The generation before the first epoch is empty, and whole; but this is no save that was not finished."""
    words = ["problems/fastat.py", "--epochs", "1", "--examples", "40", "--test-examples", "10", "--attacks", "clean"]
    words += ["--select", "clean", "--model", "one_layer_cnn", "--out", "out"]
    run_module.run(words)
    for file in Path("out").glob("*.pt"):
        file.unlink()
    left = files_of("out")
    result, lines = heard(run_module.run, [*words, "--resume"])
    assert result is None and "has no whole generation of files to go on from" in lines[0]
    assert files_of("out") == left
