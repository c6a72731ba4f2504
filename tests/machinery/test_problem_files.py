"""Problem files of the user's own: their flags, solvers and networks, and what is wrong in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import FAST, OWN, SHORT, complaint, run

import bilevel_at as ba
from bilevel_at import run as run_module
from bilevel_at.commands.plan import understand

pytestmark = pytest.mark.usefixtures("elsewhere")

TUPLES = (
    FAST
    + """
import torch
class Two(torch.nn.Module):
    def forward(self, x):
        return x, x
def model(shape, classes):
    return Two()
"""
)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1", "defines no problem(...); it must, and return a BilevelProblem"),
        ("import nothing_of_the_kind", "own.py, line 1: ModuleNotFoundError"),
        ("x = 1\ndef problem(:", "own.py: SyntaxError"),
        ("def problem(): return 3", "problem(...) returns int; it must return a BilevelProblem"),
        ("def problem(epsilon: float = 0.1): raise ValueError('no')", "problem(...) failed: ValueError: no"),
        ("def problem(loss: object): pass", "problem(loss) needs a type that a flag can have, or a default"),
        ("def problem(epochs: int = 3): pass", "--epochs would mean two things"),
        (
            "import bilevel_at as ba\ndef problem(): return ba.BilevelProblem(ba.UpperProblem(), ba.LowerProblem())",
            "LowerProblem has no constraint; pass BilevelProblem(upper, lower, threat=...)",
        ),
        (
            "from bilevel_at.problems.fastat import problem\ndef recipe(): return 3",
            "recipe() returns 3; it must map data set names",
        ),
        (
            FAST + "from bilevel_at.solvers import ZeroIG\nsolver = ZeroIG()",
            "own.py: solver is ZeroIG(); it must be a function",
        ),
        (FAST + "def recipe(): return {}['x']", "own.py, line 3: recipe() failed: KeyError: 'x'"),
        (
            FAST + "def model(shape, classes): raise RuntimeError('a\\nb')",
            "own.py, line 3: model(...) failed: RuntimeError: a b",
        ),
        ("raise SystemExit(0)", "own.py, line 1: SystemExit: 0"),
        ("def problem(steps: int = 0): return 1 / steps", "own.py, line 1: problem(...) failed: ZeroDivisionError"),
        (
            "import bilevel_at as ba\ndef attack(model, batch, delta):\n    return model(batch.x + delta)[:, 99]\n"
            "def problem(): return ba.BilevelProblem(ba.UpperProblem(), ba.Linearized(attack, ba.LinfBall(0.1)))",
            "own.py, line 3: its problem cannot be solved: IndexError",
        ),
        (TUPLES, "own.py's model gives tuple for 2 images"),
        (OWN.format(width=7), "own.py's model gives (2, 7) for 2 images; 10 classes need (2, 10)"),
        (OWN.replace("64", "63").format(width=10), "own.py: the model does not take (1, 8, 8) images: RuntimeError"),
    ],
)
def test_bad_problem_files(source, says):
    Path("own.py").write_text(source)
    assert says in complaint("own.py")


def test_a_model_of_the_user_s_own_and_loading_it():
    Path("own.py").write_text(OWN.format(width=10))
    run("own.py", *SHORT, "--out", "out")
    with pytest.raises(ba.InputError, match=r"'own.py'; pass one as load\(..., model=...\)"):
        ba.load("out")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    assert ba.load("out", model=model)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ba.InputError, match="does not fit"):
        ba.load("out", model=torch.nn.Linear(64, 10))


def test_the_file_s_solver_is_what_its_own_flags_say():
    source = FAST + (
        "from bilevel_at.solvers import FullKKT, ZeroIG\n"
        "def solver(epsilon: float, how: str = 'zero'):\n"
        "    return FullKKT(damping=epsilon) if how == 'full' else ZeroIG()\n"
    )
    Path("own.py").write_text(source)
    assert type(understand(["own.py"]).solver).__name__ == "ZeroIG"
    plan = understand(["own.py", "--how", "full", "--epsilon", "0.25", "--method", "cg"])
    assert (type(plan.solver).__name__, plan.solver.damping, plan.solver.method) == ("FullKKT", 0.25, "cg")
    assert type(understand(["own.py", "--solver", "hessian-free-kkt"]).solver).__name__ == "HessianFreeKKT"


def test_solvers_of_the_user_s_own_with_fields_that_are_no_flags():
    source = FAST + (
        "from dataclasses import dataclass\nfrom collections.abc import Callable\n"
        "from bilevel_at.solvers import HessianFreeKKT\n"
        "@dataclass\nclass Mine(HessianFreeKKT):\n    watch: Callable | None = None\n"
        "def solver():\n    return Mine(watch=print)\n"
    )
    Path("own.py").write_text(source)
    plan = understand(["own.py", "--ig-weight", "0.5"])
    assert plan.solver.ig_weight == 0.5 and plan.solver.watch is print
    for _ in range(2):
        run("own.py", *SHORT, "--out", "out", *(["--resume"] if Path("out").exists() else []))


def test_help_does_not_wait_for_required_flags(capsys):
    Path("own.py").write_text(
        "from bilevel_at.problems import fastat\ndef problem(radius: float):\n    return fastat.problem(radius)\n"
    )
    with pytest.raises(SystemExit) as done:
        run_module.run(["own.py", "--help"])
    assert done.value.code == 0 and "--radius NUMBER" in capsys.readouterr().out
    assert "--radius" in complaint("own.py")


def test_names_that_are_also_ours():
    Path("own.py").write_text(
        "import bilevel_at as ba\nfrom bilevel_at.problems import fastat\n"
        "def problem(kind: str = 'a', function: float = 0.1, solver_tol: int = 3):\n"
        "    return fastat.problem(function)\n"
    )
    assert understand(["own.py", "--kind", "b", "--function", "1/5"]).problem.lower.constraint.epsilon == 0.2


def test_a_changed_problem_file_does_not_resume():
    Path("own.py").write_text(FAST)
    run("own.py", *SHORT, "--out", "out")
    Path("own.py").write_text(FAST + "# changed")
    assert "was started with another own.py" in complaint("own.py", *SHORT, "--out", "out", "--resume")


def test_a_last_batch_of_one_joins_the_one_before():
    """Batch normalisation cannot train on a single example."""
    source = FAST + (
        "from torch import nn\n"
        "def model(shape, classes):\n"
        "    first = nn.Linear(64, 8)\n"
        "    return nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))\n"
    )
    Path("own.py").write_text(source)
    run("own.py", "--examples", "101", "--batch-size", "6", *SHORT[:2], *SHORT[4:], "--out", "out")  # 91 = 15 · 6 + 1
