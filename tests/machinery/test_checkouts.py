"""Two checkouts on one machine do not mix: each has its own problems/ and solvers/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from marks import fast

ROOT = Path(__file__).resolve().parents[2]
MARKED = ("bilevel_at/errors.py", "solvers/zero_ig.py", "problems/fgsm.py", "bilevel_at/runs/recipe.py")
SAY = """
import bilevel_at, bilevel_at.errors, bilevel_at.runs.recipe
from bilevel_at.problems import fgsm
from bilevel_at.runs.problem_file import packaged_problems
from bilevel_at.solvers import zero_ig
parts = (bilevel_at.errors, zero_ig, fgsm, bilevel_at.runs.recipe)
print(*(part.CHECKOUT for part in parts), packaged_problems()[0][0].parent.parent.name)
"""


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    """Two copies, each of whose files say which copy they are of."""
    folder = tmp_path_factory.mktemp("checkouts")
    for name in ("one", "two"):
        for part in ("bilevel_at", "solvers", "problems"):
            shutil.copytree(ROOT / part, folder / name / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder / name)
        for file in MARKED:
            with open(folder / name / file, "a") as source:
                source.write(f"\nCHECKOUT = {name!r}\n")
    return folder


def say(cwd, path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(("first", "second"), fast([("one", "two"), ("two", "one")], [("two", "one")]))
def test_a_checkout_on_the_path_is_used_whole(checkouts, tmp_path, first, second):
    """Whatever is installed, and whichever other one comes later on the path."""
    assert say(tmp_path, [checkouts / first, checkouts / second]) == [first] * 5


@pytest.mark.slow
def test_the_checkout_that_one_stands_in_is_used_whole(checkouts):
    assert say(checkouts / "two", [checkouts / "one"]) == ["two"] * 5  # python -c looks where it stands first


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_an_installed_package_does_not_mix_with_a_checkout(checkouts, tmp_path, editable):
    """As an installer lays it out: one folder with everything, or a finder that maps names to a checkout."""
    site = tmp_path / "site"
    site.mkdir()
    if editable:
        mapping = {"bilevel_at": "bilevel_at", "bilevel_at.solvers": "solvers", "bilevel_at.problems": "problems"}
        places = {name: str(checkouts / "one" / place) for name, place in mapping.items()}
        (site / "sitecustomize.py").write_text(
            "import importlib.util, sys\nfrom pathlib import Path\n"
            f"PLACES = {places!r}\n"
            "class Finder:\n"
            "    @staticmethod\n"
            "    def find_spec(name, path=None, target=None):\n"
            "        if name in PLACES:\n"
            "            file = Path(PLACES[name], '__init__.py')\n"
            "            return importlib.util.spec_from_file_location(name, file)\n"
            "sys.meta_path.append(Finder)\n"
        )
    else:
        shutil.copytree(checkouts / "one" / "bilevel_at", site / "bilevel_at")
        for part in ("solvers", "problems"):
            shutil.copytree(checkouts / "one" / part, site / "bilevel_at" / part)
    assert say(tmp_path, [checkouts / "two", site]) == ["two"] * 5
    if not editable:
        assert say(tmp_path, [site, checkouts / "two"]) == [*["one"] * 4, "bilevel_at"]
