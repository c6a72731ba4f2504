"""What the network is to withstand is one set, where the training attacker is projected another."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands.evaluate import command as evaluate_command
from bilevel_at.commands.report import command as report_command
from bilevel_at.data import load_data
from bilevel_at.diagnose import gradient_alignment
from bilevel_at.evaluate import Attack, Threat, attack_from_name, evaluate, robust_correct, set_name
from bilevel_at.evaluate.threat import check_set, measured_reach
from bilevel_at.report.groups import by_threat, group
from bilevel_at.report.radii import by_radius
from bilevel_at.runs.record import read, read_all

EPS = 0.2
SHORT = ["--attacks", "clean", "fgsm", "pgd-5-2", "beta-3", "--select", "pgd-5-1", "--test-examples", "100"]

NFGSM = '''"""Noise of 2ε, a step of ε, and no projection but onto the input range (de Jorge et al., 2022)."""
import bilevel_at as ba


def problem(epsilon: float = 0.2, tested: float | None = None) -> ba.BilevelProblem:
    """The problem.

    epsilon: of the training attacker.
    tested: the radius that the network is to withstand; epsilon if not given.
    """
    start = ba.Uniform(2 * epsilon)
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.Range(), start, "sign", epsilon, "train")
    return ba.BilevelProblem(ba.UpperProblem(), lower, threat=ba.LinfBall(epsilon if tested is None else tested))
'''

DIAMOND = '''"""A set of one's own: ‖δ‖₁ ≤ size, by its projection alone."""
from dataclasses import dataclass

import torch

import bilevel_at as ba


@dataclass(frozen=True)
class Diamond(ba.Constraint):
    size: float

    def project(self, delta, x):
        flat = delta.flatten(1)
        sizes = flat.abs().sort(1, descending=True).values
        shifts = (sizes.cumsum(1) - self.size) / torch.arange(1, sizes.shape[1] + 1, device=delta.device)
        last = (sizes > shifts).sum(1, keepdim=True) - 1
        shift = shifts.gather(1, last).clamp(min=0)
        return (flat.sign() * (flat.abs() - shift).clamp(min=0)).reshape(delta.shape)


def problem(size: float = 0.8) -> ba.BilevelProblem:
    """The problem.

    size: of the diamond.
    """
    lower = ba.Linearized(ba.minus(ba.cross_entropy), Diamond(size), "zero", "normalized", size)
    return ba.BilevelProblem(ba.UpperProblem(), lower)
'''


def made_from(source):
    """What a problem file defines."""
    module = types.ModuleType("made_from_a_text")
    sys.modules[module.__name__] = module  # where dataclasses look their annotations up
    exec(source, module.__dict__)
    return module.__dict__


Diamond = made_from(DIAMOND)["Diamond"]


@dataclasses.dataclass(frozen=True)
class Cube(ba.Constraint):
    """A cube without an input range, which states everything that attacks can use."""

    radius: float
    steepest = "sign"

    def project(self, delta, x):
        return delta.clamp(-self.radius, self.radius)

    def sample(self, x, generator=None):
        return (2 * torch.rand(x.shape, generator=generator) - 1) * self.radius


class Bare(ba.Constraint):
    """A cube that defines ``project`` alone."""

    def __init__(self, size):
        self.size = size
        self._cache = torch.zeros(3)

    def project(self, delta, x):
        return delta.clamp(-self.size, self.size)


class Outward(ba.Constraint):
    """No projection: what is done twice goes further."""

    def project(self, delta, x):
        return delta / 2


def linear(d=16, classes=3):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(d, classes)).eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """N-FGSM at 0.2, the same withstanding 0.1, and diamonds of two sizes, each with what the command printed."""
    folder = tmp_path_factory.mktemp("threat")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("nfgsm.py").write_text(NFGSM)
        Path("mine.py").write_text(DIAMOND)
        commands = {
            "nfgsm": ["nfgsm.py", "--epochs", "5"],
            "tested": ["nfgsm.py", "--epochs", "1", "--tested", "0.1", "--examples", "200"],
            "mine": ["mine.py", "--epochs", "2"],
            "small": ["mine.py", "--epochs", "1", "--size", "0.3", "--examples", "200"],
        }
        for name, command in commands.items():
            assert run_module.run([*command, *SHORT, "--out", name]) == 0
    return folder


@pytest.fixture(autouse=True)
def within(runs, monkeypatch):
    monkeypatch.chdir(runs)


def config(name):
    return json.loads(Path(name, "config.json").read_text())


def results(name, which="best"):
    return json.loads(Path(name, "results.json").read_text())[which]


def complaint(command, *args):
    with pytest.raises(ba.InputError) as error:
        command([str(a) for a in args])
    assert str(error.value).isprintable() and len(str(error.value)) < 400
    return str(error.value)


def told(folder):
    """The words of a page, a line for each row, paragraph or caption."""
    source = Path(folder, "index.html").read_text(encoding="utf-8")
    source = re.sub(r"<style>.*?</style>|<img[^>]*>", "", source, flags=re.S)
    lines = re.sub(r"<(tr|p|h\d|caption|figcaption|table)\b", "\n<", source)
    return unescape(re.sub(r"<[^>]*>", "", lines))


# --- N-FGSM, as a user would write it -------------------------------------------------------------------------------


def test_nfgsm_is_chosen_and_evaluated_at_the_radius_it_is_to_withstand(capsys):
    """The noise is of 0.4, δ goes to 0.6, and everything that is said of the network is at 0.2."""
    written = config("nfgsm")
    assert written["constraint"] == {"norm": "linf", "epsilon": EPS, "name": set_name(ba.LinfBall(EPS))}
    assert written["feasible_set"] == "Range(bounds=(0.0, 1.0), tol=None)"
    assert all((e["norm"], e["epsilon"]) == ("linf", EPS) for name, e in results("nfgsm").items() if name != "clean")
    model, (train, test) = ba.load("nfgsm"), load_data("digits")
    scores = evaluate(model, test.sample(100), ["clean", "fgsm", "pgd-5-2"], EPS, checks=0)
    assert {k: s.accuracy for k, s in scores.items()} == {k: results("nfgsm")[k]["accuracy"] for k in scores}
    assert scores["pgd-5-2"].accuracy > 0.15
    lines = [json.loads(line) for line in Path("nfgsm", "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: (line["robust"], line["clean"], line["epoch"]))
    _, held_out = train.split(0.1)
    stands = robust_correct(model, held_out, attack_from_name("pgd-5-1", EPS), seed=best["epoch"] - 1)
    assert best["robust"] == stands.float().mean().item()
    aligned = gradient_alignment(model, held_out[slice(0, 256)], ba.LinfBall(EPS), seed=best["epoch"])
    assert best["alignment"] == pytest.approx(aligned.nanmean().item(), abs=1e-6)
    assert max(line["perturbation"] for line in lines) > 0.5  # training's own attacker goes beyond 0.2


def test_a_threat_of_another_radius_than_that_of_training(capsys):
    same = ["nfgsm.py", "--epochs", "1", "--tested", "0.1", "--examples", "200", *SHORT, "--out", "tested"]
    assert run_module.run([*same, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "ε = 0.1 (trained in Range(bounds=(0.0, 1.0), tol=None))" in " ".join(shown.split())
    assert "test accuracy at ε = 0.1" in shown and "0.2" not in shown.split("held-out, ")[0]
    assert config("tested")["constraint"]["epsilon"] == 0.1 and results("tested")["fgsm"]["epsilon"] == 0.1
    assert set(results("tested")) == {"clean", "fgsm", "pgd-5-2", "beta-3"}
    assert evaluate_command(["tested", "--attacks", "pgd-2-1", "--checks", "0", "--which", "best"]) == 0
    assert results("tested")["pgd-2-1"]["epsilon"] == 0.1


def test_a_ball_is_the_threat_where_the_training_set_is_one():
    written = config("mine")
    assert "feasible_set" not in written
    problem = made_from(NFGSM)["problem"]()
    assert problem.threat == ba.LinfBall(EPS) and problem.lower.constraint == ba.Range()


# --- a set of one's own ---------------------------------------------------------------------------------------------


def test_a_set_of_one_s_own_trains_and_is_reported_by_its_name():
    assert config("mine")["constraint"] == Threat.of(Diamond(0.8)).asdict()
    assert config("mine")["constraint"] | {"settings": ""} == {
        "norm": None,
        "epsilon": None,
        "name": "Diamond(size=0.8)",
        "settings": "",
    }
    entries = results("mine")
    assert set(entries) == {"clean", "fgsm", "pgd-5-2", "beta-3"}
    for name, entry in entries.items():
        assert (entry["norm"], entry.get("threat", "")) == (None, "" if name == "clean" else "Diamond(size=0.8)")
        assert entry["outside"] == 0 and entry["accuracy"] <= entries["clean"]["accuracy"]
    assert entries["pgd-5-2"]["accuracy"] < entries["clean"]["accuracy"]
    scores = evaluate(
        ba.load("mine"), load_data("digits")[1].sample(100), ["pgd-5-2"], constraint=Diamond(0.8), checks=0
    )
    assert scores["pgd-5-2"].accuracy == entries["pgd-5-2"]["accuracy"]


def test_its_run_is_evaluated_by_naming_the_problem_file_and_never_otherwise():
    quick = ["--checks", "0", "--which", "best"]
    before = results("mine")
    line = complaint(evaluate_command, "mine", "--attacks", "pgd-2-1", *quick)
    assert "Diamond(size=0.8)" in line and "--problem-file FILE" in line and "--norm" in line
    assert "give --epsilon" in complaint(evaluate_command, "mine", "--norm", "linf", *quick)
    Path("changed.py").write_text(DIAMOND + "\n")
    assert "not the problem file of mine" in complaint(evaluate_command, "mine", "--problem-file", "changed.py", *quick)
    line = complaint(evaluate_command, "mine", "--attacks", "autoattack", "--problem-file", "mine.py", *quick)
    assert line == "attack 'autoattack' knows l∞ and l2 balls around images in [0, 1] only, not Diamond(size=0.8)"
    assert results("mine") == before
    assert evaluate_command(["mine", "--attacks", "clean", *quick]) == 0
    named = ["--attacks", "fgsm", "pgd-5-2", "pgd-2-1", "--problem-file", "mine.py"]
    assert evaluate_command(["mine", *named, "--checks", "20", "--which", "best"]) == 0
    after = results("mine")
    assert (
        after["fgsm"]["date"] and {k: v for k, v in after.items() if k in before} == before
    )  # nothing is computed twice
    assert after["pgd-2-1"]["threat"] == "Diamond(size=0.8)"
    checks = json.loads(Path("mine", "checks.json").read_text())["best"]
    assert checks["of"]["threat"] == "Diamond(size=0.8)" and "pgd" not in checks["measured"]


def test_a_ball_beside_it_has_names_and_a_table_of_its_own(capsys):
    flags = ["--attacks", "clean", "fgsm", "--norm", "linf", "--epsilon", "0.05", "0.1", "--checks", "0"]
    assert evaluate_command(["small", *flags, "--which", "best"]) == 0
    entries = results("small")
    assert entries["fgsm-linf@0.1"]["norm"] == "linf" and entries["fgsm"]["threat"] == "Diamond(size=0.3)"
    tables = capsys.readouterr().out.split("accuracy under attack ")[1:]
    assert [table.startswith(f"at ε = {e} in ℓ∞") for table, e in zip(tables, (0.05, 0.1), strict=True)] == [True, True]
    assert "fgsm-linf@0.1" in tables[1] and "fgsm-linf@0.1" not in tables[0]
    assert set(read("small").under_threat("best")) == {"clean", "fgsm", "pgd-5-2", "beta-3"}


def test_a_file_whose_neighbours_have_changed_gives_another_threat():
    written = config("small")
    other = Path("other")
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text(json.dumps({**written, "problem": {"size": 0.4}}))
    (other / "best.pt").write_bytes(Path("small", "best.pt").read_bytes())
    line = complaint(evaluate_command, "other", "--attacks", "fgsm", "--problem-file", "mine.py")
    assert "makes the threat Diamond(size=0.4)" in line and "Diamond(size=0.3)" in line


@pytest.mark.parametrize("direction", ["sign", "normalized"])
def test_attacks_by_projection_alone_reach_what_those_with_everything_do(direction):
    """In a cube, on a linear network: the steps along the gradient end in the corner that its signs name."""
    model, generator = linear(), torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, 4, 4, generator=generator) * 0.2 + 0.4
    batch = ba.Batch(x, model(x).argmax(1))
    space = Cube(0.05) if direction == "sign" else Bare(0.05)
    exact = ba.LinfBall(0.05)  # x is far enough from 0 and 1
    for name in ("pgd-60-2", "beta-60"):
        ours = attack_from_name(name, space).perturb(model, batch, torch.Generator().manual_seed(0))
        theirs = attack_from_name(name, exact).perturb(model, batch, torch.Generator().manual_seed(0))
        broken = [(model(moved).argmax(1) != batch.y) for moved in (ours, theirs)]
        assert torch.equal(*broken) and 0 < broken[0].sum() < 40
        again = attack_from_name(name, space).perturb(model, batch, torch.Generator().manual_seed(0))
        assert torch.equal(ours, again) and ((ours - x).abs() <= 0.05 + 1e-6).all()
    (step,) = attack_from_name("fgsm", space).stages
    assert (step(model, batch, generator) - x).abs().max() == pytest.approx(0.05, rel=1e-3)


def test_a_set_is_measured_by_what_it_does_to_large_perturbations():
    x = torch.rand(12, 1, 8, 8)
    assert measured_reach(Diamond(0.3), x, "normalized") == pytest.approx(0.3, rel=1e-4)
    assert measured_reach(Bare(0.1), x, "sign") == pytest.approx(0.1)
    assert measured_reach(Bare(0.1), x, "normalized") == pytest.approx(0.8, rel=1e-3)
    assert measured_reach(Bare(0.0), x, "sign") == 1.0
    assert measured_reach(Diamond(0.3), x, "sign") == measured_reach(Diamond(0.3), x, "sign")


def test_a_projection_that_is_none_is_refused_in_one_line():
    x = torch.rand(3, 1, 2, 2)
    for space in (Diamond(0.1), Bare(0.1), ba.L2Ball(0.5, (0, 1)), ba.Range()):
        check_set(space, x)
    with pytest.raises(ba.InputError, match=r"Outward\(\): project\(delta, x\) moves a point that it has projected"):
        check_set(Outward(), x)
    with pytest.raises(ba.InputError, match=r"this constraint takes inputs in \[0.2, 0.5\]"):
        check_set(ba.L2Ball(0.1, (0.2, 0.5)), x)
    with pytest.raises(ba.InputError, match="moves a point"):
        evaluate(linear(), (torch.rand(3, 1, 4, 4), torch.zeros(3).long()), ["fgsm"], constraint=Outward())
    Path("outward.py").write_text(
        DIAMOND.replace("return (flat.sign()", "return delta / 2\n        return (flat.sign()")
    )
    assert "moves a point" in complaint(run_module.run, "outward.py", "--out", "outward")
    assert not Path("outward").exists()


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_and_what_is_the_same_threat():
    assert set_name(Diamond(0.3)) == "Diamond(size=0.3)" and set_name(Bare(0.1)) == "Bare(size=0.1)"
    named = Bare(0.1)
    named.name = "my cube"
    assert set_name(named) == "my cube" and Threat.of(named).at == "in my cube"
    assert set_name(ba.Polyhedron(torch.eye(4), torch.ones(4))).startswith("Polyhedron(B=tensor[4, 4], b=tensor[4]")
    assert "0x" not in set_name(ba.Constraint()) and len(set_name(Bare("x" * 1000))) <= 120
    assert str(Threat.of(ba.LinfBall(8 / 255))) == "ℓ∞, ε = 8/255" and Threat.of(ba.L2Ball(0.5, (0, 1))).norm == "l2"
    assert Threat.of(ba.LinfBall(0.1, None)).key != Threat.of(ba.LinfBall(0.1)).key
    same = [Threat.of(s).key for s in (Bare(0.1), Bare(0.1), Bare(0.2), Diamond(0.1))]
    assert same[0] == same[1] and len(set(same)) == 3
    other = ba.Polyhedron(torch.eye(4), 2 * torch.ones(4))
    assert Threat.of(other).name == Threat.of(ba.Polyhedron(torch.eye(4), torch.ones(4))).name
    assert Threat.of(other).key != Threat.of(ba.Polyhedron(torch.eye(4), torch.ones(4))).key
    for threat in map(Threat.of, (ba.LinfBall(0.1), Diamond(0.3), other)):
        assert Threat.read(json.loads(json.dumps(threat.asdict()))).key == threat.key
    assert Threat.read({"norm": "linf", "epsilon": 0.2}).key == Threat.of(ba.LinfBall(0.2)).key  # older runs
    assert Threat.read({"norm": None, "epsilon": None}) is None and Threat.read([]) is None


def test_results_in_several_sets_do_not_share_a_name():
    model, x = linear(), torch.rand(6, 1, 4, 4)
    data = x, model(x).argmax(1)
    scores = evaluate(model, data, ["clean", "fgsm"], [0.1, 0.3], constraint=Cube(0.3), checks=0)
    assert list(scores) == ["clean", "fgsm@0.1", "fgsm@0.3", "fgsm@Cube(radius=0.3)"]
    assert scores["fgsm@Cube(radius=0.3)"].threat == "Cube(radius=0.3)" and scores["fgsm@0.3"].threat == ""
    balls = evaluate(model, data, ["fgsm"], 0.3, constraint=ba.L2Ball(0.3, (0, 1)), checks=0)
    assert set(balls) == {"fgsm@0.3", "fgsm-l2@0.3"}
    assert Attack("mine", Diamond(0.1)).threat == Threat.of(Diamond(0.1))


# --- the report -----------------------------------------------------------------------------------------------------


def test_a_page_has_a_table_and_a_ranking_for_each_threat():
    names = ["nfgsm", "tested", "small"]
    groups = group(read_all(names))
    assert [[g.runs[0].name for g in rivals] for _, rivals in by_threat(groups)] == [[name] for name in names]
    assert report_command([*names, "--out", "page", "--no-measure"]) == 0
    page = told("page")
    for at in ("at ε = 0.2 in ℓ∞", "at ε = 0.1 in ℓ∞", "in Diamond(size=0.3)"):
        assert page.count(f"Test accuracy in % of 100 images {at}") == 1
        assert page.count(f"Held-out accuracies {at}") == 1
        assert page.count(f"Robust accuracy of the best epoch less that of the last, {at}.") == 1
    assert "▲" not in page and "most robust on held-out" not in page and "keeps the most" not in page
    assert "threatℓ∞, ε = 0.2, ℓ∞, ε = 0.1, Diamond(size=0.3)" in page.replace("\n", "")
    assert "The set of training's own attacker differs from the threat" in page


def test_runs_of_one_threat_are_ranked_among_themselves(tmp_path):
    """Two methods in each of two balls: a best one in each, and no sentence across."""
    for name, epsilon, robust in (("a", 0.1, 0.7), ("b", 0.1, 0.8), ("c", 0.2, 0.3), ("d", 0.2, 0.4)):
        folder = tmp_path / name
        folder.mkdir()
        threat = {"norm": "linf", "epsilon": epsilon}
        shared = {"file": f"{name}.py", "options": {"seed": 0, "epochs": 2}, "solver": {"name": "ZeroIG"}}
        (folder / "config.json").write_text(json.dumps({**shared, "problem": threat, "constraint": threat}))
        line = {"attack": "pgd-20-1", "clean": 0.9, "train": robust + 0.1, "loss": 1.0, "lr": 0.1}
        lines = [{**line, "epoch": i, "robust": robust - 0.1 * i} for i in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        entry = {"n": 100, "seconds": 0.1, "data": "d" * 16}
        attack = {**entry, "accuracy": robust, "epsilon": epsilon, "norm": "linf"}
        clean = {**entry, "accuracy": 0.9, "epsilon": 0.0, "norm": None}
        (folder / "results.json").write_text(json.dumps({"best": {"clean": clean, "pgd-50-10": attack}}))
    assert report_command([*(str(tmp_path / n) for n in "abcd"), "--out", str(tmp_path / "page"), "--no-measure"]) == 0
    page = told(tmp_path / "page")
    assert "At ε = 0.1 in ℓ∞: Under pgd-50-10 b keeps the most, 80.0%; a follows with 70.0%" in page
    assert "At ε = 0.2 in ℓ∞: Under pgd-50-10 d keeps the most, 40.0%; c follows with 30.0%" in page
    assert "▲80.0" in page and "▲40.0" in page
    assert "b is the most robust on held-out images (60.0% under pgd-20-1), a the least (50.0%)" in page
    assert "d is the most robust on held-out images (20.0% under pgd-20-1), c the least (10.0%)" in page


def test_a_page_of_a_set_of_one_s_own_says_what_it_leaves_out():
    assert report_command(["small", "--out", "own"]) == 0
    page = told("own")
    assert "these measurements are of balls, and the threat is Diamond(size=0.3)" in page
    assert "Test accuracy in % of 100 images in Diamond(size=0.3)" in page
    assert np.isnan(read("small").results["best"]["fgsm"]["epsilon"] or np.nan) and read("small").epsilon is None


def test_accuracy_against_the_radius_keeps_norms_and_sets_apart(tmp_path):
    for name, norm in (("a", "linf"), ("b", "l2")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({"file": f"{name}.py", "options": {"seed": 0}, "constraint": {"norm": norm, "epsilon": 0.2}})
        )
        entry = {"accuracy": 0.5, "n": 9, "seconds": 0, "norm": norm}
        entries = {"fgsm": {**entry, "epsilon": 0.2}, "fgsm@0.4": {**entry, "epsilon": 0.4}}
        entries["fgsm@Cube(radius=0.1)"] = {**entry, "norm": None, "threat": "Cube(radius=0.1)", "epsilon": 0.1}
        (folder / "results.json").write_text(json.dumps({"best": entries}))
    both = by_radius(group(read_all([tmp_path / "a", tmp_path / "b"])))
    assert {attack: list(panel) for attack, panel in both.items()} == {"fgsm-linf": ["a"], "fgsm-l2": ["b"]}
    assert both["fgsm-l2"]["b"] == [(0.2, 0.5), (0.4, 0.5)]
    assert list(by_radius(group(read_all([tmp_path / "b"])))) == ["fgsm"]
