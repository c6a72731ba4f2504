"""Reading a run directory never runs code and never leaves the directory, whatever its files say."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from running import unchecked

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands import flags
from bilevel_at.commands.evaluate import command as evaluate
from bilevel_at.commands.report import command as report_command
from bilevel_at.evaluate import evaluate as evaluate_in_python
from bilevel_at.report import report

MODEL = """import torch
from bilevel_at.problems.fastat import problem

def model(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(shape[0] * shape[1] * shape[2], classes))
"""
HOSTILE = "from pathlib import Path\nPath('stolen').write_text('')\n" + MODEL
NASTY = "<script>alert('x')</script> \"q\" $x_{^2$ \x1b[31m"
QUICK = ["--attacks", "clean", "--checks", "0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``own``: a run whose network its problem file defines; ``named``: one of a network known by name."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "mine.py").write_text(MODEL)
    flags = ["--epochs", "1", "--examples", "40", "--test-examples", "20", "--attacks", "clean", "--select", "fgsm"]
    assert run_module.run([str(folder / "mine.py"), *flags, "--epsilon", "0.2", "--out", str(folder / "own")]) == 0
    assert run_module.run(["problems/fastat.py", *flags, "--out", str(folder / "named")]) == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, runs):
    """Every test in a copy; ``own`` names a file that writes ``stolen`` as it is run, and has the file's own hash."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    unchecked("own", "named")  # whoever writes hostile files can write their hashes, too
    Path("own/evil.py").write_text(HOSTILE)
    change("own/config.json", file=str(Path("own/evil.py").resolve()), file_sha256=sha256("own/evil.py"))
    yield
    assert not Path("stolen").exists()


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def change(path, **settings):
    config = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**config, **settings}))


def complaint(action, *args, **named):
    """What is said of a mistake, in one line that a terminal shows as it is."""
    with pytest.raises((ba.InputError, ba.BilevelError)) as error:
        action(*args, **named)
    assert str(error.value).isprintable()
    return str(error.value)


def page(runs, **options):
    """The text of a report, without its tags."""
    return re.sub("<[^>]+>", "", report(runs, "page", **options).read_text(encoding="utf-8"))


def images():
    return torch.rand(4, 1, 8, 8), torch.arange(4)


def test_the_problem_file_of_a_run_is_not_run():
    assert "--problem-file FILE" in complaint(evaluate, ["own", *QUICK])
    assert "--problem-file FILE" in complaint(evaluate, ["named", "--attacks", "transfer:own"])
    assert "pass one as load(..., model=...)" in complaint(ba.load, "own")
    model = ba.load("named")
    assert "load(..., model=...)" in complaint(
        evaluate_in_python, model, images(), ["transfer:own"], 0.2, checks=0, surrogates=ba.load
    )
    text = page(["own"])
    assert "Not measured: evil: the network of own is defined" in text and "--problem-file FILE" in text
    report(["own"], "page", measure=False)
    assert not Path("own/evaluation/commands.json").exists()


@pytest.mark.slow
def test_the_commands_do_not_run_it_either():
    for module, rest in (("evaluate", QUICK), ("report", ["--no-measure"])):
        command = [sys.executable, "-m", f"bilevel_at.{module}", "own", *rest]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == (2 if module == "evaluate" else 0), done.stderr
        assert len(done.stderr.splitlines()) == (module == "evaluate")


def test_the_file_that_the_user_names_is_run():
    change("own/config.json", file="somewhere/mine.py", file_sha256=sha256("mine.py"))
    assert evaluate(["own", *QUICK, "--problem-file", "mine.py"]) == 0
    assert json.loads(Path("own/results.json").read_text())["best"]["clean"]["n"] == 20
    flags = ["--attacks", "transfer:own:fgsm", "--which", "last", "--checks", "0", "--problem-file", "mine.py"]
    assert evaluate(["named", *flags]) == 0
    assert report_command(["own", "named", "--out", "page", "--problem-file", "mine.py"]) == 0
    assert "Not measured" not in Path("page/index.html").read_text(encoding="utf-8")


def test_a_file_that_is_named_must_be_the_one_of_the_run():
    Path("other.py").write_text(HOSTILE.replace("evil", "other") + "\n# another\n")
    for args in (["own", *QUICK], ["named", "--attacks", "transfer:own"]):
        assert "--problem-file other.py is not the problem file of own" in complaint(
            evaluate, [*args, "--problem-file", "other.py"]
        )
    assert "any of these runs" in complaint(report, ["own"], "page", problem_file=["other.py"])
    assert "any of these runs" in complaint(report, ["named"], "page", problem_file=["other.py"])
    assert "does not exist" in complaint(evaluate, ["own", "--problem-file", "nowhere.py"])
    assert "named is no such run" in complaint(evaluate, ["named", "--problem-file", "other.py"])
    flags = ["--model", "small_cnn", "--epsilon", "0.2", "--problem-file", "other.py"]
    assert "--problem-file is for runs" in complaint(evaluate, ["named/best.pt", *flags])


def test_what_runs_is_the_file_and_no_cached_bytecode():
    """Bytecode of another source, with the size and the time of the named file: Python's import would take it."""
    source = HOSTILE.replace("write_text('')", "touch()")
    Path("mine.py").write_text(MODEL + "#" * (len(source) - len(MODEL)))
    stat = Path("mine.py").stat()
    cached = Path(py_compile.compile("mine.py")).resolve()
    kept = Path("mine.py").read_text()
    Path("mine.py").write_text(source)
    os.utime("mine.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    py_compile.compile("mine.py", cfile=str(cached))
    Path("mine.py").write_text(kept)
    os.utime("mine.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    change("own/config.json", file_sha256=sha256("mine.py"))
    assert evaluate(["own", *QUICK, "--problem-file", "mine.py"]) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"model": ["file"]},
        {"model": "../../etc"},
        {"shape": [1, 8]},
        {"shape": "abc"},
        {"shape": [1, 8, -8]},
        {"classes": "10"},
        {"classes": True},
        {"file": NASTY},
        {"file": None},
    ],
    ids=str,
)
def test_what_a_configuration_may_say(settings):
    """One line, from every reader."""
    change("own/config.json", **settings)
    complaint(ba.load, "own")
    complaint(evaluate, ["own", *QUICK])
    complaint(evaluate, ["named", "--attacks", "transfer:own"])
    report(["own"], "page")


class Malicious:
    def __reduce__(self):
        return (open, ("stolen", "w"))


def pickles():
    """A checkpoint that torch saved, a bare pickle, and one in the form that torch used before its archives."""
    torch.save({"model": Malicious()}, "zip.pt")
    torch.save({"model": Malicious()}, "legacy.pt", _use_new_zipfile_serialization=False)
    Path("bare.pt").write_bytes(pickle.dumps(Malicious()))
    return ["zip.pt", "legacy.pt", "bare.pt"]


def test_no_pickle_is_loaded():
    model = ba.load("named")
    for path in pickles():
        for which in ("best", "last"):
            shutil.copy(path, f"named/{which}.pt")
        assert "is not a checkpoint of tensors" in complaint(ba.load, "named")
        assert "is not a checkpoint of tensors" in complaint(evaluate, ["named", *QUICK])
        said = complaint(evaluate_in_python, model, images(), ["transfer:named"], 0.2, checks=0, surrogates=ba.load)
        assert "is not a checkpoint of tensors" in said
        assert "is not a checkpoint of tensors" in page(["named"])
        resume = ["problems/fastat.py", "--out", "named", "--resume"]
        flags = ["--epochs", "1", "--examples", "40", "--test-examples", "20", "--attacks", "clean", "--select", "fgsm"]
        assert "is not a checkpoint of tensors" in complaint(run_module.run, [*resume, *flags])


def test_no_array_is_unpickled():
    assert evaluate(["named", "--attacks", "clean", "fgsm", "beta-1", "--checks", "0"]) == 0
    stored = sorted(Path("named").rglob("*.npz"))
    assert Path("named/history.npz") in stored and len(stored) >= 7
    for path in stored:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
        np.savez(path, **{name: np.array([Malicious()], dtype=object) for name in names})
    report(["named"], "page")
    assert evaluate(["named", "--attacks", "clean", "fgsm", "--checks", "0"]) == 0


def test_entries_of_results_do_not_lead_out_of_the_run():
    """The worst case of all attacks is formed from files inside the directory only."""
    assert evaluate(["named", "--attacks", "clean", "fgsm", "beta-1", "--which", "best", "--checks", "0"]) == 0
    assert "worst case of all" in page(["named"])
    shutil.move("named/evaluation", "elsewhere")
    results = json.loads(Path("named/results.json").read_text())
    for entry in results["best"].values():
        entry["file"] = f"../elsewhere/best/{Path(entry['file']).name}"
    Path("named/results.json").write_text(json.dumps(results))
    assert "worst case of all" not in page(["named"])
    assert len(list(Path("elsewhere/best").iterdir())) == 3


def test_nothing_is_written_through_a_link():
    """Archives can hold links: what is written replaces them, and not what they lead to."""
    private = Path("private").resolve()
    private.write_text("mine")
    links = [".results.json.partial", ".checks.json.partial", "evaluation/best/.clean.npz.partial", "results.json"]
    for name in [*links, "report/.index.html.partial", "report/figures/training.png", "report/figures/examples-0.png"]:
        link = Path("named", name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(private)
    private.write_text("{}")
    assert evaluate(["named", "--attacks", "clean", "--checks", "5"]) == 0
    report(["named"])
    assert private.read_text() == "{}"
    shutil.rmtree("named/evaluation")
    Path("folder").mkdir()
    Path("named/evaluation").symlink_to(Path("folder").resolve())
    assert "leads out of named" in complaint(evaluate, ["named", *QUICK, "--again"])
    assert list(Path("folder").iterdir()) == []
    Path("named/metrics.jsonl").rename("kept")
    Path("named/metrics.jsonl").symlink_to(Path("kept").resolve())
    ba.train.RunDir("named").write_metrics([{"epoch": 1}, {"epoch": 2}])
    assert len(Path("kept").read_text().splitlines()) == 1 and not Path("named/metrics.jsonl").is_symlink()


def nasty(value):
    """The same JSON with the hostile text in every string and in every name of an attack or a checkpoint."""
    if isinstance(value, dict):
        return {key: nasty(v) for key, v in value.items()}
    if isinstance(value, list):
        return [nasty(v) for v in value]
    return f"{value}{NASTY}" if isinstance(value, str) else value


@pytest.mark.parametrize(
    "name", ["config.json", "results.json", "checks.json", "metrics.jsonl", "evaluation/commands.json"]
)
def test_no_text_of_a_run_reaches_the_page_as_markup(name):
    assert evaluate(["named", "--attacks", "clean", "fgsm", "--checks", "5"]) == 0
    path = Path("named", name)
    if name == "metrics.jsonl":
        path.write_text("".join(json.dumps(nasty(json.loads(line))) + "\n" for line in path.read_text().splitlines()))
    else:
        content = nasty(json.loads(path.read_text()))
        if name == "results.json":
            content["best"] |= {NASTY: {**content["best"]["fgsm"]}, f"{NASTY}@0.1": {**content["best"]["fgsm"]}}
            content[NASTY] = content["last"]
        path.write_text(json.dumps(content))
    source = report(["named"], "page", measure=False).read_text(encoding="utf-8")
    assert "<script" not in source and "\x1b" not in source
    assert "alert(" in source or name == "checks.json"  # without warnings it has no text


def test_messages_do_not_move_the_cursor(monkeypatch, capsys):
    """A file's text in an error is printed with its control characters written out."""
    Path("named/config.json").write_text(
        json.dumps({"model": "small_cnn", "options": {"data": "\x1b[2J\nx"}, "problem": {}})
    )
    monkeypatch.setattr(sys, "argv", ["evaluate", "named"])
    assert flags.main(evaluate, "bilevel_at.evaluate") == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and errors.strip().isprintable() and "\\x1b[2J\\nx" in errors
